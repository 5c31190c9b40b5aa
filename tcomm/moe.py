"""Exchanging the tokens of mixture-of-experts layers: every backend behind one call, and each by itself."""

from tcomm.groups.moe.gradients import combine_tokens, dispatch_tokens
from tcomm.groups.moe.high_throughput import HighThroughput
from tcomm.groups.moe.layers import BACKENDS, Backend, Experts, MoeShape, make_backend
from tcomm.groups.moe.low_latency import LowLatency
from tcomm.groups.moe.one_sided import OneSided
from tcomm.groups.moe.two_sided import TwoSided
from tcomm.groups.setup import Membership, from_process_group, from_store

__all__ = [
    "BACKENDS",
    "Backend",
    "Experts",
    "HighThroughput",
    "LowLatency",
    "Membership",
    "MoeShape",
    "OneSided",
    "TwoSided",
    "combine_tokens",
    "dispatch_tokens",
    "from_process_group",
    "from_store",
    "make_backend",
]

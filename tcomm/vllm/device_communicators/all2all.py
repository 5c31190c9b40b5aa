"""`vllm.distributed.device_communicators.all2all`: the managers that dispatch tokens."""

from tcomm.groups.all2all.base import All2AllManagerBase
from tcomm.groups.all2all.cache import Cache
from tcomm.groups.all2all.deep_ep import (
    DeepEPAll2AllManagerBase,
    DeepEPHTAll2AllManager,
    DeepEPLLAll2AllManager,
)
from tcomm.groups.all2all.flashinfer import (
    FlashInferAllToAllManager,
    FlashInferNVLinkOneSidedManager,
    FlashInferNVLinkTwoSidedManager,
)
from tcomm.groups.all2all.gather import AgRsAll2AllManager
from tcomm.groups.all2all.naive import NaiveAll2AllManager
from tcomm.groups.all2all.nixl import NixlEPAll2AllManager
from tcomm.groups.all2all.pplx import PPLXAll2AllManager
from tcomm.vllm.parallel_state import get_dp_group, get_tp_group, in_the_same_node_as

__all__ = [
    "AgRsAll2AllManager",
    "All2AllManagerBase",
    "Cache",
    "DeepEPAll2AllManagerBase",
    "DeepEPHTAll2AllManager",
    "DeepEPLLAll2AllManager",
    "FlashInferAllToAllManager",
    "FlashInferNVLinkOneSidedManager",
    "FlashInferNVLinkTwoSidedManager",
    "NaiveAll2AllManager",
    "NixlEPAll2AllManager",
    "PPLXAll2AllManager",
    "get_dp_group",
    "get_tp_group",
    "in_the_same_node_as",
]

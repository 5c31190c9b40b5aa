"""Where the experts of a model go: planning, in numpy, without communication; and what goes by the plans.

A load [L, E] says how many tokens chose each expert of each layer. A plan puts each expert into one or more
of P slots, P / G of them on each GPU, so that no GPU has much more to do than the others. `EplbState` counts
loads while a model runs, plans, and has weights moved.
"""

from tcomm.eplb.bound import balancedness_bound
from tcomm.eplb.choose import StepCosts, choose
from tcomm.eplb.incremental import CopyCosts
from tcomm.eplb.maps import balancedness, gpu_loads, initial_map, logical_maps
from tcomm.eplb.migration import Copy, LayerMoves, Migration, migration
from tcomm.eplb.plans import Plan, make_plan, replan
from tcomm.eplb.policies import (
    EPLB_POLICIES,
    AbstractEplbPolicy,
    DefaultEplbPolicy,
    IncrementalEplbPolicy,
    SearchEplbPolicy,
    register_policy,
)
from tcomm.eplb.routing import choose_slots, share_thresholds
from tcomm.eplb.shapes import Shape
from tcomm.eplb.split import split_tokens
from tcomm.eplb.state import (
    EplbLayerState,
    EplbModelState,
    EplbState,
    EplbStats,
    LoadStatistics,
    MixtureOfExperts,
    Rearrangement,
)
from tcomm.eplb.tensors import compute_logical_maps, rebalance_experts

__all__ = [
    "EPLB_POLICIES",
    "AbstractEplbPolicy",
    "Copy",
    "CopyCosts",
    "DefaultEplbPolicy",
    "EplbLayerState",
    "EplbModelState",
    "EplbState",
    "EplbStats",
    "IncrementalEplbPolicy",
    "LayerMoves",
    "LoadStatistics",
    "Migration",
    "MixtureOfExperts",
    "Plan",
    "Rearrangement",
    "SearchEplbPolicy",
    "Shape",
    "StepCosts",
    "balancedness",
    "balancedness_bound",
    "choose",
    "choose_slots",
    "compute_logical_maps",
    "gpu_loads",
    "initial_map",
    "logical_maps",
    "make_plan",
    "migration",
    "rebalance_experts",
    "register_policy",
    "replan",
    "share_thresholds",
    "split_tokens",
]

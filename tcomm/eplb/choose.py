"""Groups on nodes, or any expert on any GPU: which gives the shorter step."""

from __future__ import annotations

import dataclasses

import numpy as np

from tcomm.eplb.maps import gpu_loads
from tcomm.eplb.plans import Plan, make_plan, where_experts_go
from tcomm.eplb.shapes import FloatArray, IntArray, LoadArray, Shape, checked_load
from tcomm.errors import ConfigError

__all__ = ["StepCosts", "choose", "step_seconds"]


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """What a step of a model costs, roughly.

    Raises:
        ConfigError: when a number is not above 0.
    """

    tokens: float
    """Tokens of a step, over all GPUs."""
    node_gbps: float = 50.0
    """Gigabytes a second that a GPU takes in from other nodes."""
    nbytes_per_token: float = 7168 * 3.0
    """Bytes of a token's way there and back: 7168 values, one byte each there and two back."""
    seconds_per_token: float = 2e-7
    """Time that a GPU takes for one token in one expert."""
    top_k: int = 8
    """Experts of a token."""
    groups_per_token: int | None = None
    """Groups that the experts of a token come from, at most; None: any."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{field.name}={value!r} is wrong; give a number above 0")


def step_seconds(
    phy2log: IntArray, load: LoadArray, shape: Shape, costs: StepCosts, *, grouped: bool
) -> tuple[FloatArray, FloatArray]:
    """Predicted time of a step in each layer: in the experts of the busiest GPU, and between nodes.

    A token goes once to each node that has one of its experts. A node has one with the probability that not
    all its choices fall elsewhere: choices of groups where groups stay on nodes and a token's experts come
    from few of them, otherwise of experts.

    Args:
        phy2log: [L, P].
        load: [L, E]; the step has the same proportions.
        shape: the numbers; its nodes are those of the machine.
        costs: of a step.
        grouped: whether the map keeps groups on nodes.

    Returns:
        Two times [L]; a step takes their sum.
    """
    values = checked_load(load, np.float64)
    total = np.maximum(values.sum(axis=1), np.finfo(np.float64).tiny)
    part = gpu_loads(phy2log, values, shape.num_gpus) / total[:, None]
    experts = part.max(axis=1) * costs.tokens * costs.top_k * costs.seconds_per_token
    nodes = shape.num_nodes if shape.num_gpus % shape.num_nodes == 0 else 1
    of_nodes = part.reshape(len(part), nodes, shape.num_gpus // nodes).sum(axis=2)
    choices = costs.top_k
    if grouped and costs.groups_per_token is not None:
        choices = min(choices, costs.groups_per_token)
    reached = 1 - (1 - np.minimum(of_nodes, 1)) ** choices
    from_outside = costs.tokens * reached.max(axis=1) * (nodes - 1) / nodes
    nbytes = from_outside * costs.nbytes_per_token / (shape.num_gpus // nodes)
    return experts, nbytes / (costs.node_gbps * 1e9)


def choose(load: LoadArray, shape: Shape, costs: StepCosts, *, policy: str = "search") -> Plan:
    """Plan both ways, and take the one whose steps are predicted to be shorter.

    Args:
        load: [L, E].
        shape: the numbers; its nodes are those of the machine.
        costs: of a step.
        policy: what plans.

    Returns:
        The plan; its reason has the predictions.

    Raises:
        ConfigError: when load, shape or policy make no sense.
    """
    anywhere = make_plan(load, shape.everywhere(), policy=policy)
    if shape.num_nodes == 1:
        return anywhere
    if not shape.is_hierarchical:
        return dataclasses.replace(anywhere, reason=where_experts_go(shape))
    on_nodes = make_plan(load, shape, policy=policy)
    times = {
        name: [float(part.sum()) for part in step_seconds(plan.phy2log, load, shape, costs, grouped=grouped)]
        for name, plan, grouped in (("hierarchical", on_nodes, True), ("global", anywhere, False))
    }
    first = sum(times["hierarchical"]) <= sum(times["global"])
    said = ["hierarchical", "global"] if first else ["global", "hierarchical"]
    texts = [
        f"{name}: {1e3 * sum(times[name]):.3g} ms a step predicted, {1e3 * times[name][0]:.3g} in experts "
        f"and {1e3 * times[name][1]:.3g} between nodes"
        for name in said
    ]
    seconds = on_nodes.seconds + anywhere.seconds
    return dataclasses.replace(on_nodes if first else anywhere, seconds=seconds, reason=" < ".join(texts))

"""What is planned: how many experts, slots, groups, nodes and GPUs; and which loads and maps make sense."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from tcomm.errors import ConfigError

__all__ = ["FloatArray", "IntArray", "LoadArray", "Shape", "checked_load", "checked_map"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
LoadArray = npt.NDArray[Any]

_LARGEST = float(np.finfo(np.float32).max)
"""Of a load: sums of any number of them are finite."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers of a plan.

    Raises:
        ConfigError: when they do not divide one another as they must; says which and why.
    """

    num_experts: int
    """Logical experts, E."""
    num_replicas: int
    """Physical slots, P: one for each expert and the redundant ones."""
    num_groups: int = 1
    """Groups of neighbouring experts; one of them is kept on one node, when nodes divide groups."""
    num_nodes: int = 1
    """Nodes that share the GPUs evenly."""
    num_gpus: int = 1
    """Expert-parallel ranks; slot p is on rank `p // (P / num_gpus)`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ConfigError(f"{field.name}={value!r} is wrong; give an integer of 1 or more")
        if self.num_replicas < self.num_experts:
            raise ConfigError(
                f"{self.num_replicas} replicas are fewer than {self.num_experts} experts; each needs one"
            )
        _divides("num_replicas", self.num_replicas, "num_gpus", self.num_gpus)
        if self.is_hierarchical:
            _divides("the number of experts", self.num_experts, "num_groups", self.num_groups)
            _divides("num_gpus", self.num_gpus, "num_nodes", self.num_nodes)

    @property
    def is_hierarchical(self) -> bool:
        """Whether groups are kept on a node each: nodes must divide groups."""
        return self.num_groups % self.num_nodes == 0

    @property
    def slots_per_gpu(self) -> int:
        """Slots of one rank."""
        return self.num_replicas // self.num_gpus

    def by_group(self, of_experts: LoadArray) -> LoadArray:
        """[L, E] as [L, groups, experts of a group]."""
        return of_experts.reshape(len(of_experts), self.num_groups, self.num_experts // self.num_groups)

    def planned(self) -> Shape:
        """The shape that is planned for: one group on one node when groups cannot be kept on nodes."""
        if self.is_hierarchical:
            return self
        return dataclasses.replace(self, num_groups=1, num_nodes=1)

    def everywhere(self) -> Shape:
        """The same numbers with every expert allowed on every GPU."""
        return dataclasses.replace(self, num_groups=1, num_nodes=1)


def _divides(name: str, number: int, divisor_name: str, divisor: int) -> None:
    if number % divisor:
        raise ConfigError(f"{name} ({number}) must be a multiple of {divisor_name} ({divisor})")


def checked_load(load: LoadArray, dtype: type[np.floating[Any]]) -> npt.NDArray[Any]:
    """The load as floats, when it is one.

    Args:
        load: [L, E], tokens that chose each expert; of any real dtype.
        dtype: what it becomes.

    Returns:
        [L, E] of `dtype`.

    Raises:
        ConfigError: when it has another number of axes, no expert, or a value that is negative, not a
            number, or too large for float32; names the first.
    """
    given = np.asarray(load)
    if given.ndim != 2 or not given.shape[1]:
        raise ConfigError(f"a load of shape {list(given.shape)} is wrong; give [layers, experts]")
    if given.dtype.kind not in "biuf":
        raise ConfigError(f"a load of dtype {given.dtype} is wrong; give real numbers")
    with np.errstate(over="ignore", invalid="ignore"):
        values = given.astype(dtype)
        # Also false for what is no number.
        fine = (values >= 0) & (values <= _LARGEST)
    if not fine.all():
        layer, expert = np.argwhere(~fine)[0].tolist()
        raise ConfigError(
            f"the load of expert {expert} in layer {layer} is {given[layer, expert]}; "
            f"give numbers from 0 to {_LARGEST:.3g}"
        )
    return values


def checked_map(
    name: str, given: LoadArray, num_layers: int, shape: Shape, *, whole: bool = True
) -> IntArray:
    """A map from slots to experts, when it is one of that shape.

    Args:
        name: how an error calls it.
        given: [L, P], the expert of each slot.
        num_layers: L.
        shape: what it is a map of.
        whole: whether each expert must be somewhere, and each slot hold one; otherwise -1 is allowed.

    Returns:
        [L, P] int64.

    Raises:
        ConfigError: when it is of another shape or dtype, or names an expert that is not there; when `whole`,
            also when an expert is nowhere.
    """
    array = np.asarray(given)
    wanted = [num_layers, shape.num_replicas]
    if list(array.shape) != wanted or array.dtype.kind not in "iu":
        raise ConfigError(
            f"{name} is {array.dtype} {list(array.shape)}; give integers {wanted}: [layers, slots]"
        )
    lowest = 0 if whole else -1
    wrong = (array < lowest) | (array >= shape.num_experts)
    if wrong.any():
        layer, slot = np.argwhere(wrong)[0].tolist()
        raise ConfigError(
            f"{name} has expert {array[layer, slot]} in slot {slot} of layer {layer}; "
            f"give {lowest} to {shape.num_experts - 1}"
        )
    array = array.astype(np.int64)
    if whole:
        present = np.zeros((num_layers, shape.num_experts), bool)
        np.put_along_axis(present, array, True, axis=1)
        if not present.all():
            layer, expert = np.argwhere(~present)[0].tolist()
            raise ConfigError(
                f"{name} has no slot with expert {expert} in layer {layer}; give each one or more"
            )
    return array

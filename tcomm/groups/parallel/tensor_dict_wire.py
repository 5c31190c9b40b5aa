"""How a dict with tensors in it travels: one message, and the tensors of devices behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tcomm.errors import DecodeError, UsageError
from tcomm.objects.codec import register

if TYPE_CHECKING:
    from tcomm.groups.parallel.tensor_verbs import TensorVerbs

__all__ = ["Packed", "Slicing", "TensorMetadata", "check_dict", "pack", "unpack"]


@register
class TensorMetadata(NamedTuple):
    """A tensor without its values."""

    device: str
    """Type of its device, such as `cuda`: the receiver allocates on its own device of that type."""
    dtype: torch.dtype
    size: torch.Size


class Slicing(NamedTuple):
    """Which tensors travel as a slice, to be gathered by the receiver's `group`. Alike at both ends."""

    group: TensorVerbs | None = None
    chosen: dict[str, bool] | None = None

    def applies(self, key: Any, numel: int) -> bool:
        """Whether a tensor of `numel` elements under `key` travels as a slice."""
        if self.group is None or numel == 0:
            return False
        return (self.chosen or {}).get(key, numel % self.group.world_size == 0)

    def kind(self, key: Any, numel: int) -> str:
        """`slice` or `tensor`: how one of `numel` elements under `key` travels."""
        return "slice" if self.applies(key, numel) else "tensor"

    def refuse_another(self, key: Any, kind: str, numel: int) -> None:
        """Raise when what came is not of the kind that this end expects.

        Raises:
            UsageError: when the ends slice in different ways.
        """
        expected = self.kind(key, numel)
        if kind != expected:
            raise UsageError(
                f"{key!r} was sent as a {kind} and is expected as a {expected}: give the same "
                "all_gather_group and all_gather_tensors at both ends"
            )

    def cut(self, key: Any, x: torch.Tensor) -> torch.Tensor:
        """What travels of x.

        Raises:
            UsageError: when a slice was asked for and the elements of x cannot be shared out.
        """
        if self.group is None or not self.applies(key, x.numel()):
            return x
        if x.numel() % self.group.world_size:
            raise UsageError(
                f"all_gather_tensors asks for slices of {key!r}, whose {x.numel()} elements do not divide "
                f"by the {self.group.world_size} ranks of group {self.group.unique_name!r}"
            )
        return x.reshape(self.group.world_size, -1)[self.group.rank_in_group]

    def sent_size(self, key: Any, size: torch.Size) -> torch.Size:
        """Size of what travels of a tensor of `size`."""
        if self.group is None or not self.applies(key, size.numel()):
            return size
        return torch.Size([size.numel() // self.group.world_size])


class Packed(NamedTuple):
    """A dict on its way."""

    message: list[tuple[Any, str, Any]]
    """Of each key: itself; whether a `value`, a `tensor` or a `slice` of one; and the value, the tensor, or
    what is cut from it and its whole size; of what is on a device the metadata. This is encoded."""
    on_devices: list[torch.Tensor]
    """Tensors that follow the message, in the order of the dict; none is empty."""


def check_dict(tensor_dict: Any) -> dict[Any, Any]:
    """`tensor_dict`, when it is a dict.

    Raises:
        UsageError: "Expecting a dictionary, got ..."
    """
    if not isinstance(tensor_dict, dict):
        raise UsageError(f"Expecting a dictionary, got {type(tensor_dict)}")
    return tensor_dict


def pack(tensor_dict: Any, slicing: Slicing) -> Packed:
    """Take a dict apart.

    Raises:
        UsageError: as `check_dict` does.
    """
    packed = Packed([], [])
    for key, value in check_dict(tensor_dict).items():
        if not isinstance(value, torch.Tensor):
            packed.message.append((key, "value", value))
            continue
        x, kind = slicing.cut(key, value), slicing.kind(key, value.numel())
        if x.is_cpu:
            # It says itself what it is; metadata would take a quarter as long again.
            packed.message.append((key, kind, x if kind == "tensor" else (x, value.size())))
            continue
        packed.message.append((key, kind, TensorMetadata(value.device.type, value.dtype, value.size())))
        if x.numel():
            packed.on_devices.append(x.contiguous())
    return packed


def unpack(
    message: Any, slicing: Slicing, receive: Callable[[torch.Tensor], None]
) -> tuple[dict[Any, Any], list[Callable[[], None]]]:
    """Put a dict together again.

    Args:
        message: what came.
        slicing: as at the other end.
        receive: called, in order, with each tensor on a device that has to be received.

    Returns:
        The dict, and functions that gather what came as slices, to be called in order when all has come.

    Raises:
        DecodeError: when the message is no dict.
        UsageError: when it was sliced in another way.
    """
    result: dict[Any, Any] = {}
    finish: list[Callable[[], None]] = []
    try:
        for key, kind, value in message:
            if kind == "value":
                result[key] = value
                continue
            if isinstance(value, TensorMetadata):
                size = value.size
                slicing.refuse_another(key, kind, size.numel())
                result[key] = _receive(key, value, slicing, receive)
            else:
                result[key], size = _in_host_memory(kind, value)
                slicing.refuse_another(key, kind, size.numel())
            if kind == "slice":
                finish.append(functools.partial(_gather, result, key, size, slicing))
    except UsageError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise DecodeError(f"what came is no dict with tensors: {error!r}") from error
    return result, finish


def _in_host_memory(kind: str, value: Any) -> tuple[torch.Tensor, torch.Size]:
    """What came of a tensor, and the size of it all."""
    x, size = value if kind == "slice" else (value, value.size())
    if not isinstance(x, torch.Tensor) or not isinstance(size, torch.Size):
        raise TypeError(f"{type(x).__name__} of {size!r} is no tensor")
    return x, size


def _receive(
    key: Any, metadata: TensorMetadata, slicing: Slicing, receive: Callable[[torch.Tensor], None]
) -> torch.Tensor:
    size = slicing.sent_size(key, metadata.size)
    x = torch.empty(size, dtype=metadata.dtype, device=metadata.device)
    if x.numel():
        receive(x)
    return x


def _gather(result: dict[Any, Any], key: Any, size: torch.Size, slicing: Slicing) -> None:
    if slicing.group is not None:
        result[key] = slicing.group.all_gather(result[key], dim=0).reshape(size)

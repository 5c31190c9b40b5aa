"""Checks of what a caller gives, before anything is published."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from tcomm.algorithms import reduce_op_name
from tcomm.errors import ConfigError
from tcomm.signature import CallDescription

__all__ = [
    "NOTHING",
    "UNSET",
    "Timeout",
    "Unset",
    "check_dim",
    "check_new",
    "check_out",
    "check_prepared",
    "check_rank",
    "check_sizes",
    "check_splits",
    "check_tensor",
    "dtype_name",
    "find_unequal_splits",
    "has_memory",
    "has_tangent",
    "is_flat_memory",
    "is_ordinary",
    "is_plain",
    "num_dispatch_modes",
    "refuse_integer_average",
    "refuse_tracers",
    "refuse_unequal_splits",
    "share_bytes",
]


def dtype_name(dtype: torch.dtype) -> str:
    """As torch spells it, without `torch.`."""
    return str(dtype).removeprefix("torch.")


class Unset:
    """The type of a timeout that was not given."""


UNSET: Final = Unset()
NOTHING: Final = torch.empty(0, device="cpu")
"""Input and result of a verb that has none."""
Timeout = float | str | None
"""Seconds, a profile, or None: as long as the peers live."""


def check_prepared(max_nbytes: object, dtypes: Sequence[object], ops: Sequence[object]) -> list[str]:
    """The names of dtypes and operations that something is prepared for.

    Raises:
        ConfigError: when max_nbytes is no size, or a list has something else in it.
    """
    if type(max_nbytes) is not int or not 0 < max_nbytes < _MAX_PREPARED_BYTES:
        raise ConfigError(f"max_nbytes={max_nbytes!r} is not a positive number of bytes")
    if not isinstance(dtypes, Sequence) or isinstance(dtypes, str):
        raise ConfigError(f"dtypes={dtypes!r} is no list; give one, such as [torch.bfloat16]")
    if not isinstance(ops, Sequence) or isinstance(ops, str):
        raise ConfigError(f"ops={ops!r} is no list; give one, such as ['sum']")
    if wrong := [dtype for dtype in dtypes if not isinstance(dtype, torch.dtype)]:
        raise ConfigError(f"dtypes has {wrong[0]!r}, which is no torch.dtype")
    known = [dtype_name(dtype) for dtype in dtypes if isinstance(dtype, torch.dtype)]
    return [*known, *map(reduce_op_name, ops)]


_MAX_PREPARED_BYTES = 1 << 40
_MAX_NEW_BYTES = 1 << 60


def check_new(shape: object, dtype: object) -> torch.Size:
    """The shape of a tensor that is to be made.

    Raises:
        ConfigError: when it is none, or dtype is no dtype of dense tensors.
    """
    if not isinstance(dtype, torch.dtype) or dtype_name(dtype).startswith(("q", "bits")):
        raise ConfigError(f"dtype={dtype!r} is no torch.dtype of dense tensors")
    try:
        lengths = [operator.index(length) for length in shape]  # type: ignore[attr-defined]
    except TypeError:
        raise ConfigError(f"shape={shape!r} is no sequence of integers") from None
    if min(lengths, default=0) < 0:
        raise ConfigError(f"shape={shape!r} has a negative length")
    # Strides of a tensor without elements have to be numbers of 64 bits as well.
    if math.prod(max(length, 1) for length in lengths) * dtype.itemsize > _MAX_NEW_BYTES:
        raise ConfigError(f"shape={shape!r} of {dtype} is more than any memory")
    return torch.Size(lengths)


def check_tensor(verb: str, x: object, loses_gradient: bool = True) -> torch.Tensor:
    """`x`, when it is a dense tensor with memory, whose gradient would not be lost.

    Raises:
        ConfigError: when it is not.
    """
    if not isinstance(x, torch.Tensor):
        raise ConfigError(f"{verb} takes a torch.Tensor, not {type(x).__name__}")
    refuse_tracers(verb)
    if x.is_nested:
        raise ConfigError(
            f"{verb} takes a dense tensor, not a nested one; give x.to_padded_tensor(0.0) or x.unbind()"
        )
    if x.layout != torch.strided:
        raise ConfigError(
            f"{verb} takes a dense tensor, not one of layout {x.layout}; call .to_dense() first"
        )
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ConfigError(f"{verb} takes a plain tensor, not a {type(x).__name__}; give its local tensor")
    if x.is_quantized:
        raise ConfigError(f"{verb} takes no quantised tensor; call .dequantize() or .int_repr() first")
    if loses_gradient and x.requires_grad and torch.is_grad_enabled():
        raise ConfigError(
            f"{verb} would lose the gradient of its input; call it under torch.no_grad() or on x.detach()"
        )
    if loses_gradient and has_tangent(x):
        raise ConfigError(
            f"{verb} would lose the forward-mode gradient of its input; call it on unpack_dual(x).primal, "
            "and again on its tangent where the verb is linear"
        )
    if x.device.type in {"cpu", "cuda"} and not has_memory(x):
        raise ConfigError(f"{verb} takes a tensor with memory; that of this one was freed, or never there")
    return x


def is_ordinary(x: torch.Tensor) -> bool:
    """Whether `check_tensor` need not look again at an x like one that it has let pass.

    Some of what it refuses is of the moment, and not of the tensor's kind.
    """
    return (
        type(x) is torch.Tensor
        and not x.requires_grad
        and forward_ad._current_level < 0
        and _current_transform() is None
        and not (num_dispatch_modes() or _num_function_modes())
        and has_memory(x)
    )


_current_transform: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
num_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_num_function_modes = torch._C._len_torch_function_stack


def has_tangent(x: torch.Tensor) -> bool:
    """Whether x carries a gradient of forward mode."""
    if forward_ad._current_level < 0:
        return False
    try:
        return forward_ad.unpack_dual(x).tangent is not None
    except RuntimeError:
        # torch.func.vmap inside of torch.func.jvp does not tell.
        return True


def has_memory(x: torch.Tensor) -> bool:
    """Whether the elements of x, if there are any, are somewhere: nobody has freed the storage behind it."""
    try:
        # Without a storage, an address is only the distance from its beginning.
        return not x.numel() or x.data_ptr() != x.storage_offset() * x.itemsize
    except RuntimeError:
        return False  # it has outlived the transform that it belongs to


def refuse_tracers(verb: str) -> None:
    """Check that a call, which reads and writes memory itself, does not go by what transforms or records it.

    Raises:
        ConfigError: when it would.
    """
    if (transform := _current_transform()) is not None:
        raise ConfigError(
            f"{verb} cannot run inside of {transform.key().name.lower()} of torch.func, where tensors have "
            "no memory; call it outside of that, or tcomm.functional, which vmap and functionalize know"
        )
    if get_proxy_mode() is not None or torch._C._get_tracing_state() is not None:
        raise ConfigError(
            f"{verb} would be missing in what make_fx or torch.jit.trace records; use torch.compile, or with "
            "make_fx an op of tcomm.functional"
        )
    for key in (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.FUNCTIONAL):
        if (mode := torch._C._get_dispatch_mode(key)) is not None:
            raise ConfigError(f"{verb} cannot run in {type(mode).__name__}, whose tensors have no memory")


def check_out(
    verb: str, x: torch.Tensor, out: torch.Tensor, shape: Sequence[int], may_alias: bool = True
) -> None:
    """Check that `out` can take a result of `shape`, and is apart from x, or x itself where it `may_alias`.

    Raises:
        ConfigError: when it cannot; says given and needed.
    """
    check_tensor(verb, out)
    if tuple(out.shape) != tuple(shape) or out.dtype != x.dtype or out.device != x.device:
        raise ConfigError(
            f"out= of {verb} is {dtype_name(out.dtype)} {list(out.shape)} on {out.device}; "
            f"needed {dtype_name(x.dtype)} {list(shape)} on {x.device}"
        )
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ConfigError(f"out= of {verb} was made in inference mode and cannot be written outside of it")
    if overlaps(x, out):
        raise ConfigError(f"out= of {verb} overlaps the input without being the input; give other memory")
    if not may_alias and out.numel() and out.data_ptr() == x.data_ptr():
        raise ConfigError(
            f"out= of {verb} is the input, and its parts do not stay where they are; give other memory"
        )
    if any(n > 1 and s == 0 for n, s in zip(out.shape, out.stride(), strict=True)):
        raise ConfigError(f"out= of {verb} has several elements in one place; give memory of its own to each")


def overlaps(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether two tensors share some bytes and are not the same view."""
    if x.data_ptr() == out.data_ptr() and x.stride() == out.stride() and x.shape == out.shape:
        return False
    return share_bytes(x, out)


def is_plain(x: torch.Tensor) -> bool:
    """Whether the values of x are its memory: negated and conjugated views are flags on other values."""
    return x.is_contiguous() and not (x.is_neg() or x.is_conj())


def is_flat_memory(x: object) -> bool:
    """Whether x is a tensor whose values are aligned memory of the host, one after another, and some."""
    if not isinstance(x, torch.Tensor) or torch._C._get_tracing_state() is not None:
        return False
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or x.layout != torch.strided:
        return False
    try:
        return x.is_cpu and x.numel() > 0 and is_plain(x) and x.data_ptr() % x.itemsize == 0
    except RuntimeError:
        return False  # a wrapper of a transform has no memory


def share_bytes(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether the extents of two tensors in memory meet."""
    if x.numel() == 0 or out.numel() == 0:
        return False
    (x_first, x_last), (out_first, out_last) = _extent(x), _extent(out)
    return x_first <= out_last and out_first <= x_last


def _extent(x: torch.Tensor) -> tuple[int, int]:
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + span * x.itemsize + x.itemsize - 1


def refuse_integer_average(reduce: str, dtype: torch.dtype) -> None:
    """Check that an average can be what it is asked to be.

    Raises:
        ConfigError: when it cannot.
    """
    if reduce == "avg" and not (dtype.is_floating_point or dtype.is_complex):
        raise ConfigError(f"the average of {dtype} is not a {dtype}")


def check_rank(verb: str, what: str, rank: int, world_size: int, myself: int | None = None) -> int:
    """`rank`, when it is in the group, and another than `myself` where that is given.

    Raises:
        ConfigError: when it is not. Nothing was sent.
    """
    if not isinstance(rank, int) or not 0 <= rank < world_size:
        raise ConfigError(
            f"{what}={rank!r} of {verb} is not a rank of this group; ranks are 0 to {world_size - 1}"
        )
    if rank == myself:
        raise ConfigError(f"{what}={rank} of {verb} is this rank itself; name another")
    # True is a number that is written otherwise, and ranks compare what is written.
    return int(rank)


def check_dim(verb: str, shape: Sequence[int], dim: int) -> int:
    """`dim` counted from the front.

    Raises:
        ConfigError: when a tensor of `shape` has no such dimension.
    """
    if not len(shape):
        raise ConfigError(f"{verb} of a 0-d tensor has no dimension to go along; reshape(1)")
    try:
        index = operator.index(dim)
    except TypeError:
        raise ConfigError(f"dim={dim!r} of {verb} is no integer") from None
    if not -len(shape) <= index < len(shape):
        raise ConfigError(
            f"dim={dim} of {verb}: a tensor of shape {list(shape)} has dimensions {-len(shape)} to "
            f"{len(shape) - 1}"
        )
    return index % len(shape)


def check_sizes(what: str, sizes: Sequence[int], world_size: int) -> tuple[int, ...]:
    """One length for each rank, none of them negative.

    Raises:
        ConfigError: when they are not that.
    """
    try:
        lengths = tuple(int(operator.index(size)) for size in sizes)
    except TypeError:
        raise ConfigError(f"{what}={sizes!r} has entries that are no integers") from None
    if len(lengths) != world_size:
        raise ConfigError(f"{what} has {len(lengths)} entries; needed one for each of {world_size} ranks")
    if any(length < 0 for length in lengths):
        raise ConfigError(f"{what}={list(lengths)} has a negative entry")
    return lengths


def check_splits(what: str, splits: Sequence[int] | None, rows: int, world_size: int) -> tuple[int, ...]:
    """Rows for each rank: as given, or equal.

    Raises:
        ConfigError: when there is not one for each rank, one is negative, or they do not add up.
    """
    if splits is None:
        if rows % world_size:
            raise ConfigError(f"{rows} rows do not divide among {world_size} ranks; give {what}=")
        return (rows // world_size,) * world_size
    lengths = check_sizes(what, splits, world_size)
    if sum(lengths) != rows:
        raise ConfigError(f"{what}={list(lengths)} adds up to {sum(lengths)}; the tensor has {rows} rows")
    return lengths


def find_unequal_splits(calls: Sequence[CallDescription]) -> list[tuple[int, int]]:
    """Every (source, destination) of which one sends what the other does not expect."""
    ranks = range(len(calls))
    return [
        (s, d)
        for s in ranks
        for d in ranks
        # Who gave no recv_splits takes what comes.
        if calls[d].recv_splits and calls[s].send_splits[d] != calls[d].recv_splits[s]
    ]


def refuse_unequal_splits(calls: Sequence[CallDescription]) -> list[str]:
    """Every pair of ranks of which one sends what the other does not expect, as sentences."""
    return [
        f"rank {src} sends {calls[src].send_splits[dst]} rows to rank {dst}, "
        f"which expects {calls[dst].recv_splits[src]}"
        for src, dst in find_unequal_splits(calls)
    ]

"""From the experts that tokens chose to slots, evenly among replicas, and how often each slot was chosen."""

from __future__ import annotations

import numpy as np
import torch

from tcomm.cpu import expert_slots as host
from tcomm.eplb.shapes import FloatArray
from tcomm.errors import ConfigError
from tcomm.memory.expert_slots import SHARE_BITS, SlotCounter

__all__ = ["choose_slots", "share_thresholds"]

_INTEGERS = (torch.int64, torch.int32)
_MOST_SALT = 1 << 20


def choose_slots(  # noqa: PLR0913
    topk_idx: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    *,
    expert_load: torch.Tensor | None = None,
    first_slot: int = 0,
    num_unpadded_tokens: torch.Tensor | int | None = None,
    should_record: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
    salt: int = 0,
    out: torch.Tensor | None = None,
    engine: str = "",
) -> torch.Tensor:
    """Give each choice of an expert one of its slots, and count. Not collective.

    Choices of an expert go to its replicas in turn, within each block of 256 choices (in the order of
    `topk_idx`, row by row); the next block begins at the next replica. So with n blocks the loads of two
    replicas differ by n at most, whatever tokens choose. The same input gives the same slots on every device.

    On a GPU it is one launch that allocates nothing where `out` is given and never waits for the host, so
    it can be captured; call it once before, with the same dtypes and options, which compiles it.

    Example: topk_idx=[[0, 1], [0, 2], [0, -1]], map=[[0, 3], [1, -1], [2, -1]], count=[2, 1, 1] ->
    [[0, 1], [3, 2], [0, -1]], and the load of the slots [2, 1, 1, 1].

    Args:
        topk_idx: [T, k] int64 or int32, contiguous: logical experts; -1 is no choice and stays -1.
        logical_to_physical_map: [E, X] int64, one layer's: slots of each expert, filled up with -1. Rows may
            be further apart than X.
        logical_replica_count: [E] int64, contiguous: how many they are. An expert that has none gets -1.
        expert_load: [S] int32 or int64, contiguous, to which counts are added; None: nothing is counted.
        first_slot: of the slots that `expert_load` is for: P / G * rank where it is of local slots only.
        num_unpadded_tokens: tokens that count, the first ones; an integer, or one in a tensor, which may
            change between replays of a graph. None, or more than T: all. Padding gets slots all the same.
        should_record: one bool in a tensor: whether anything counts. None: it does.
        share: [E, X] int32, contiguous, of `share_thresholds`; None: an even split.
        salt: at which replica to begin, 0 to 2**20 - 1; give the rank, so that ranks begin at different ones.
        out: [T, k] of the dtype of `topk_idx`, contiguous, other memory; None: it is made.
        engine: `cpu`, or `triton` for the kernel; empty: what suits the device.

    Returns:
        [T, k] of the dtype of `topk_idx`: physical slots; `out` where that is given.

    Raises:
        ConfigError: when an argument is wrong, and for an expert out of range on a CPU. On a GPU such a
            choice gets -1.
        CapabilityError: when the kernel is asked for where none can run.
    """
    _check_maps(topk_idx, logical_to_physical_map, logical_replica_count, share)
    is_host = _is_host(topk_idx, engine)
    if isinstance(salt, bool) or not isinstance(salt, int) or not 0 <= salt < _MOST_SALT:
        raise ConfigError(
            f"salt={salt!r} is wrong; give an integer from 0 to {_MOST_SALT - 1}, as the rank is"
        )
    counter = None
    if expert_load is not None:
        counter = SlotCounter(expert_load, first_slot, num_unpadded_tokens, should_record)
        _check_counter(counter, topk_idx.device)
    if out is None:
        out = torch.empty_like(topk_idx)
    _check("out", out, list(topk_idx.shape), (topk_idx.dtype,), topk_idx.device)
    if out.numel() and out.data_ptr() == topk_idx.data_ptr():
        raise ConfigError("out is topk_idx itself, which is read while out is written; give other memory")
    given = (topk_idx, logical_to_physical_map, logical_replica_count, share, salt, out)
    if not is_host:
        from tcomm.kernels import expert_slots as kernel

        kernel.choose_slots(*given, counter)
        return out
    host.choose_slots(*given)
    if counter is not None:
        host.count_slots(out, counter)
    return out


def share_thresholds(
    share: FloatArray, logical_to_physical_map: torch.Tensor, logical_replica_count: torch.Tensor
) -> torch.Tensor:
    """An uneven split as `choose_slots` takes it: made once, when the map changes.

    A spreading value has 16 bits, and goes to the first replica whose threshold is above it.

    Example: share=[0.25, 1, 0.75], map=[[0, 2], [1, -1]], count=[2, 1] -> [[16384, 65536], [65536, 65536]].

    Args:
        share: [L, P] or [P], of `split_tokens`: the part of its expert's tokens that each slot takes.
        logical_to_physical_map: [L, E, X] or [E, X] int64.
        logical_replica_count: [L, E] or [E] int64.

    Returns:
        int32 of the shape and device of the map, contiguous.

    Raises:
        ConfigError: when shapes do not fit, a share is negative or not finite, or an expert gets nothing
            anywhere.
    """
    slots, counts = logical_to_physical_map.cpu().numpy(), logical_replica_count.cpu().numpy()
    parts = np.asarray(share, np.float64)
    if slots.shape[:-1] != counts.shape or parts.shape[:-1] != slots.shape[:-2] or slots.ndim < 2:
        raise ConfigError(
            f"share {list(parts.shape)}, map {list(slots.shape)} and count {list(counts.shape)} do not fit; "
            "give [L, P], [L, E, X] and [L, E], or those of one layer"
        )
    if not (np.isfinite(parts) & (parts >= 0)).all():
        raise ConfigError("a share is negative or not finite; give those of split_tokens")
    is_there = np.arange(slots.shape[-1]) < counts[..., None]
    if slots.size and (slots[is_there] >= parts.shape[-1]).any():
        raise ConfigError(f"the map has slot {slots.max()}, and share is for {parts.shape[-1]} slots")
    rows = np.where(is_there, slots, 0).reshape(*slots.shape[:-2], -1)
    taken = np.take_along_axis(parts, rows, axis=-1).reshape(slots.shape) * is_there
    sums = taken.cumsum(axis=-1)
    total = sums[..., -1:]
    if ((total[..., 0] == 0) & (counts > 0)).any():
        expert = np.argwhere((total[..., 0] == 0) & (counts > 0))[0].tolist()
        raise ConfigError(
            f"the shares of expert {expert[-1]} are all 0; give those of its replicas a sum of 1"
        )
    levels = np.rint(sums / np.where(total > 0, total, 1) * (1 << SHARE_BITS)).astype(np.int32)
    return torch.from_numpy(levels).to(logical_to_physical_map.device)


def _is_host(topk_idx: torch.Tensor, engine: str) -> bool:
    is_host = topk_idx.device.type == "cpu"
    chosen = engine or ("cpu" if is_host else "triton")
    if chosen not in {"cpu", "triton"} or (chosen == "cpu" and not is_host):
        raise ConfigError(
            f"engine={engine!r} for choices on {topk_idx.device}; give 'triton', or 'cpu' on a CPU"
        )
    return chosen == "cpu"


def _check(
    name: str, x: torch.Tensor, shape: list[int], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    is_like = isinstance(x, torch.Tensor) and list(x.shape) == shape and x.dtype in dtypes
    if is_like and x.device == device and x.is_contiguous():
        return
    wanted = f"{' or '.join(map(_name_of, dtypes))} {shape} on {device}"
    if not isinstance(x, torch.Tensor):
        raise ConfigError(f"{name} is {type(x).__name__}; give a tensor: {wanted}")
    gaps = "" if x.is_contiguous() else ", not contiguous"
    given = f"{_name_of(x.dtype)} {list(x.shape)} on {x.device}{gaps}"
    raise ConfigError(f"{name} is {given}; give {wanted}, contiguous")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_one(name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Whatever its dimensions are."""
    _check(name, x.reshape(-1) if isinstance(x, torch.Tensor) else x, [1], dtypes, device)


def _check_maps(
    topk_idx: torch.Tensor, slots: torch.Tensor, counts: torch.Tensor, share: torch.Tensor | None
) -> None:
    for name, x in (("topk_idx", topk_idx), ("logical_to_physical_map", slots)):
        if not isinstance(x, torch.Tensor) or x.dim() != 2:
            given = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ConfigError(f"{name} is {given}; give a tensor of two dimensions, one layer's")
    device, (num_experts, width) = topk_idx.device, slots.shape
    _check("topk_idx", topk_idx, list(topk_idx.shape), _INTEGERS, device)
    if num_experts < 1 or width < 1:
        raise ConfigError(
            f"logical_to_physical_map is {[num_experts, width]}; give an expert and a place at least"
        )
    # Rows may be further apart than they are long.
    row = slots[:1] if slots.stride(1) == 1 and num_experts else slots
    _check("a row of logical_to_physical_map", row, list(row.shape), (torch.int64,), device)
    _check("logical_replica_count", counts, [num_experts], (torch.int64,), device)
    if share is not None:
        _check("share", share, [num_experts, width], (torch.int32,), device)
    if device.type == "cpu" and topk_idx.numel():
        low, high = (int(found) for found in torch.aminmax(topk_idx))
        if low < -1 or high >= num_experts:
            wrong = low if low < -1 else high
            raise ConfigError(f"topk_idx has expert {wrong}; give 0 to {num_experts - 1}, or -1 for none")


def _check_counter(counter: SlotCounter, device: torch.device) -> None:
    load, num = counter.load, counter.num_unpadded_tokens
    numel = load.numel() if isinstance(load, torch.Tensor) else 0
    _check("expert_load", load, [numel], _INTEGERS, device)
    first = counter.first_slot
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ConfigError(f"first_slot={first!r} is wrong; give an integer of 0 or more")
    if isinstance(num, torch.Tensor):
        _check_one("num_unpadded_tokens", num, _INTEGERS, device)
    elif num is not None and (isinstance(num, bool) or not isinstance(num, int) or num < 0):
        raise ConfigError(
            f"num_unpadded_tokens={num!r} is wrong; give an integer of 0 or more, a tensor of one, or None"
        )
    if counter.should_record is not None:
        _check_one("should_record", counter.should_record, (torch.bool,), device)

"""Bytes between the ranks of a process group, by its own CPU backend and without pickle."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

from tcomm.errors import CommError, ConfigError, PeerLostError, PeerTimeoutError

__all__ = ["comm_error", "gather_rows", "has_cpu_backend"]

_LENGTH_BYTES = 4


def has_cpu_backend(group: dist.ProcessGroup) -> bool:
    """Whether a process group takes tensors on the host; one of NCCL alone does not."""
    return any(device.type == "cpu" for device in group._device_types)


def gather_rows(group: dist.ProcessGroup, payload: bytes, row_nbytes: int, timeout: float) -> list[bytes]:
    """Every rank's payload, in the order of group ranks. **Collective.**

    Works on groups that torch does not know, too: it asks the group itself and translates no ranks.

    Args:
        group: with a backend for the CPU.
        payload: of this rank, of `row_nbytes` less 4 at most.
        row_nbytes: the same on every rank.
        timeout: seconds.

    Raises:
        ConfigError: when the payload does not fit its row.
        PeerTimeoutError: when a rank did not come in time. PeerLostError: when one is gone.
    """
    if len(payload) > row_nbytes - _LENGTH_BYTES:
        raise ConfigError(f"{len(payload)} bytes do not fit a row of {row_nbytes} with its length")
    filled = (len(payload).to_bytes(_LENGTH_BYTES, "little") + payload).ljust(row_nbytes, b"\0")
    mine = torch.frombuffer(bytearray(filled), dtype=torch.uint8)
    rows = [torch.empty_like(mine) for _ in range(group.size())]
    try:
        group.allgather([rows], [mine]).wait(datetime.timedelta(seconds=timeout))
    except RuntimeError as error:
        raise comm_error(error, "gather_rows", group, timeout) from error
    return [_payload(row.numpy().tobytes()) for row in rows]


def _payload(row: bytes) -> bytes:
    length = int.from_bytes(row[:_LENGTH_BYTES], "little")
    return row[_LENGTH_BYTES : _LENGTH_BYTES + length]


def comm_error(
    error: RuntimeError, op: str, group: dist.ProcessGroup, timeout: float, peers: tuple[int, ...] = ()
) -> CommError:
    """What a failure of gloo means, with the ranks that were waited for."""
    reason = str(error).strip().partition("\n")[0]
    whom = f"for rank{'s' * (len(peers) > 1)} {', '.join(map(str, peers))}" if peers else "for the others"
    if "imed out" in reason or "imeout" in reason:
        kind: type[CommError] = PeerTimeoutError
        told = f"{op}: Timed out after {timeout:g} s of waiting {whom}: {reason}"
    else:
        kind, told = PeerLostError, f"{op}: the connection was lost while waiting {whom}: {reason}"
    return kind(told, group=group.group_name, op=op, rank=group.rank(), peers=peers)

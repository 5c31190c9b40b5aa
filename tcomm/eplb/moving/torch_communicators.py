"""Rows of experts by the send and recv of torch.distributed: gloo, from host memory, and NCCL."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import datetime
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tcomm.eplb.moving.communicator import EplbCommunicator
from tcomm.errors import CommError, ConfigError, PeerLostError, PeerTimeoutError
from tcomm.groups.arguments import check_rank, is_plain

__all__ = ["TorchGlooCommunicator", "TorchNcclCommunicator"]

_FOR_EVER = 7 * 24 * 3600.0


@dataclasses.dataclass(frozen=True)
class _Transfer:
    is_send: bool
    peer: int
    row: torch.Tensor
    """[bytes] uint8"""


class _TorchCommunicator(EplbCommunicator):
    """What both have.

    Args:
        group: process group of the ranks.
        seconds: of one `execute`; None: as long as it takes.
    """

    def __init__(self, group: dist.ProcessGroup, seconds: float | None) -> None:
        self._group = group
        self._seconds = seconds
        self._noted: list[_Transfer] = []
        self._stream: torch.cuda.Stream | None = None

    def add_send(self, tensors: Sequence[torch.Tensor], dst_rank: int, expert_id: int) -> None:
        """See `EplbCommunicator`.

        Raises:
            ConfigError: when the rank is wrong, or a tensor is not contiguous.
        """
        self._note(True, tensors, f"add_send of expert {expert_id}", dst_rank)

    def add_recv(self, tensors: Sequence[torch.Tensor], src_rank: int, expert_id: int) -> None:
        """See `EplbCommunicator`.

        Raises:
            ConfigError: as `add_send` does.
        """
        self._note(False, tensors, f"add_recv of expert {expert_id}", src_rank)

    def _note(self, is_send: bool, tensors: Sequence[torch.Tensor], verb: str, peer: int) -> None:
        check_rank(verb, "dst_rank" if is_send else "src_rank", peer, self._group.size(), self._group.rank())
        for tensor in tensors:
            if not is_plain(tensor):
                raise ConfigError(f"a row of {list(tensor.shape)} is not contiguous; give it as it lies")
            if tensor.numel():
                self._noted.append(_Transfer(is_send, peer, tensor.detach().view(-1).view(torch.uint8)))

    def set_stream(self, stream: torch.cuda.Stream | None) -> None:
        """Use this stream in `execute`; None: the current one."""
        self._stream = stream

    def execute(self) -> None:
        """See `EplbCommunicator`."""
        noted, self._noted = self._noted, []
        if noted:
            # There any tensor may be written, whatever mode it was made in.
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                self._execute(noted)

    @abc.abstractmethod
    def _execute(self, noted: list[_Transfer]) -> None:
        """Do what was noted, on the stream of this moment."""

    def _deadline(self) -> float:
        return time.monotonic() + (_FOR_EVER if self._seconds is None else self._seconds)

    def _error(self, kind: type[CommError], told: str, peers: Sequence[int]) -> CommError:
        text = f"moving experts by torch.distributed: {told}"
        return kind(text, op="move_experts", rank=self._group.rank(), peers=peers)


class TorchGlooCommunicator(_TorchCommunicator):
    """Rows by gloo. Those of a GPU go through host memory."""

    def __init__(self, group: dist.ProcessGroup, seconds: float | None) -> None:
        super().__init__(group, seconds)
        self._abandoned: list[Any] = []

    def _execute(self, noted: list[_Transfer]) -> None:
        deadline, started = self._deadline(), []
        on_host = [dataclasses.replace(each, row=_on_host(each)) for each in noted]
        try:
            # Whoever waits for a sender is ready before anybody sends.
            for each in sorted(on_host, key=lambda each: each.is_send):
                with self._naming(each):
                    started.append((self._start(each), each))
            for work, each in started:
                left = max(deadline - time.monotonic(), 0.001)
                with self._naming(each):
                    work.wait(datetime.timedelta(seconds=left))
        except BaseException:
            # Gloo may write to what it was given until its group ends.
            self._abandoned += [started, on_host]
            raise
        for given, each in zip(noted, on_host, strict=True):
            if not each.is_send and given.row is not each.row:
                given.row.copy_(each.row)

    def _start(self, each: _Transfer) -> dist.Work:
        if each.is_send:
            work = dist.isend(each.row, group=self._group, group_dst=each.peer)
        else:
            work = dist.irecv(each.row, group=self._group, group_src=each.peer)
        assert work is not None
        return work

    @contextlib.contextmanager
    def _naming(self, each: _Transfer) -> Iterator[None]:
        """Turn what torch raises into an error that names the peer."""
        try:
            yield
        except RuntimeError as error:
            told = str(error).splitlines()[0]
            is_late = "imed out" in told or "imeout" in told
            what = f"{'sending to' if each.is_send else 'receiving from'} rank {each.peer} failed: {told}"
            raise self._error(PeerTimeoutError if is_late else PeerLostError, what, [each.peer]) from error


def _on_host(each: _Transfer) -> torch.Tensor:
    """The row where gloo finds it: what is sent, or memory for what is received."""
    if each.row.device.type == "cpu":
        return each.row
    return each.row.to("cpu") if each.is_send else torch.empty_like(each.row, device="cpu")


class TorchNcclCommunicator(_TorchCommunicator):
    """Rows by NCCL, from GPU to GPU.

    A peer that dies may leave kernels on the GPU that never end; they are given up at the deadline, and with
    them the process group.
    """

    def _execute(self, noted: list[_Transfer]) -> None:
        deadline = self._deadline()
        ops = [
            dist.P2POp(
                dist.isend if each.is_send else dist.irecv, each.row, group=self._group, group_peer=each.peer
            )
            for each in noted
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        done = torch.cuda.current_stream(noted[0].row.device).record_event()
        while not done.query():
            if time.monotonic() >= deadline:
                peers = sorted({each.peer for each in noted})
                raise self._error(PeerTimeoutError, f"no answer of one of ranks {peers}", peers)
            time.sleep(0.0002)

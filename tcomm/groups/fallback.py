"""Running torch.distributed: NCCL or gloo, for what tcomm's own algorithms do not do.

Every call has a deadline, and what torch raises becomes one of tcomm's errors. The arguments have been
checked and the ranks have agreed before anything here is called.
"""

from __future__ import annotations

import datetime
import functools
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

from tcomm.errors import CapabilityError, CommError, PeerLostError, PeerTimeoutError
from tcomm.memory.channel import Channel
from tcomm.memory.control import Word
from tcomm.signature import CallDescription

__all__ = ["TorchFallback"]

_DYING_SECONDS = 1.0
_SLICE_SECONDS = 0.05
"""Of a wait inside torch, during which no signal of Python's is handled."""
_AT_ONCE = datetime.timedelta(milliseconds=1)
_FOR_EVER = 7 * 24 * 3600.0


class _WaitedAside:
    """A transfer between two ranks by gloo, waited for by a thread, and once.

    Gloo breaks the connection when a wait for a transfer ends without it, so none can be cut into slices.
    """

    def __init__(self, work: dist.Work, seconds: float) -> None:
        self._work = work
        self._ended = threading.Event()
        self._error: Exception | None = None
        threading.Thread(target=self._wait, args=(seconds,), name="tcomm-transfer", daemon=True).start()

    def _wait(self, seconds: float) -> None:
        try:
            self._work.wait(datetime.timedelta(seconds=max(seconds, 0.001)))
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error
        self._ended.set()

    def is_completed(self) -> bool:
        """Whether it has ended, well or badly."""
        return self._ended.is_set()

    def wait(self, timeout: datetime.timedelta | None = None) -> None:
        """Wait for its end, or raise that it has not come."""
        if not self._ended.wait(None if timeout is None else timeout.total_seconds()):
            raise RuntimeError("Timed out waiting for a transfer")
        if self._error is not None:
            raise self._error


class TorchFallback:
    """torch.distributed on one process group.

    Args:
        name: of the tcomm group, for errors.
        group: to run on.
        channel: of the tcomm group, which knows who is dead; None where the ranks share no memory.
    """

    def __init__(
        self,
        name: str,
        group: dist.ProcessGroup,
        channel: Channel | None,
    ) -> None:
        self.rank = group.rank()
        self.world_size = group.size()
        self._name = name
        self.group = group
        """The process group that carries it out."""
        self._channel = channel
        # Waiting in slices would abort a communicator of NCCL.
        self.is_gloo = all(backend == "gloo" for _, backend in self.backends)

    @property
    def backends(self) -> tuple[tuple[str, str], ...]:
        """(device, backend) pairs of the process group."""
        config = dist.get_backend_config(self.group)
        pairs = [pair.split(":") for pair in config.split(",") if ":" in pair]
        return tuple((device, backend) for device, backend in pairs)

    def gather_bytes(self, payload: bytes, nbytes: int, timeout: float | None) -> list[bytes]:
        """Every rank's payload, of at most `nbytes` less 2. **Collective.**"""
        data = len(payload).to_bytes(2, "little") + payload
        padded = torch.frombuffer(bytearray(data.ljust(nbytes, b"\0")), dtype=torch.uint8)
        mine = padded.to(self._device_of_bytes())
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        self.run("agree", timeout, lambda: dist.all_gather(rows, mine, group=self.group, async_op=True))
        gathered = [bytes(row.cpu().numpy()) for row in rows]
        return [row[2 : 2 + int.from_bytes(row[:2], "little")] for row in gathered]

    def _device_of_bytes(self) -> str:
        """Host memory, or where no backend moves that, the device of one that there is."""
        devices = [device for device, _ in self.backends]
        return "cpu" if "cpu" in devices or not devices else devices[0]

    def send(self, x: torch.Tensor, dst: int, timeout: float | None) -> None:
        """Send x to one rank."""
        self._let_errors_name("send")
        start = functools.partial(dist.isend, x, group_dst=dst, group=self.group)
        self._transfer("send", timeout, start, x)

    def recv(self, out: torch.Tensor, src: int, timeout: float | None) -> None:
        """Receive into out from one rank."""
        self._let_errors_name("recv")
        start = functools.partial(dist.irecv, out, group_src=src, group=self.group)
        self._transfer("recv", timeout, start, out)

    def _transfer(
        self, op: str, timeout: float | None, start: Callable[[], dist.Work | None], x: torch.Tensor
    ) -> None:
        def start_aside() -> _WaitedAside | None:
            work = start()
            return None if work is None else _WaitedAside(work, _FOR_EVER if timeout is None else timeout)

        self.run(op, timeout, start_aside if self.is_gloo else start, self._by_nccl(x))

    def _by_nccl(self, x: torch.Tensor) -> bool:
        return dict(self.backends).get(x.device.type) == "nccl"

    def _let_errors_name(self, op: str) -> None:
        """Put down a verb that the ranks do not agree on first."""
        if self._channel is not None:
            self._channel.name_call(CallDescription(op))

    def run(
        self,
        op: str,
        timeout: float | None,
        start: Callable[[], dist.Work | _WaitedAside | None],
        on_stream: bool = False,
    ) -> None:
        """Start an operation of torch and wait for it, as long as `timeout` allows and the peers live.

        Args:
            op: verb, for errors.
            timeout: seconds; None: as long as the peers live.
            start: starts it.
            on_stream: the current stream waits, and this thread does not; the deadline is then that of the
                process group, which watches over its streams.

        Raises:
            CapabilityError: when torch cannot do it.
            PeerLostError, PeerTimeoutError, CommError: when it failed.
        """
        deadline = time.monotonic() + (_FOR_EVER if timeout is None else timeout)
        try:
            work = start()
            if work is not None and on_stream:
                # With a timeout NCCL would block this thread until the GPU is done.
                work.wait()
            elif work is not None:
                while not self._wait_a_little(work, deadline):
                    pass
        except CommError:
            raise
        except (RuntimeError, ValueError, dist.DistError) as error:
            self._translate(op, timeout, error)

    def _wait_a_little(self, work: dist.Work | _WaitedAside, deadline: float) -> bool:
        """Whether `work` is done. In between, signals are handled, and the dead are looked for.

        Torch sees the dead only where it reads from.
        """
        left = deadline - time.monotonic()
        sliced = left > _SLICE_SECONDS and self.is_gloo
        try:
            work.wait(datetime.timedelta(seconds=_SLICE_SECONDS if sliced else max(left, 0.001)))
        except RuntimeError:
            if not sliced:
                raise
            if work.is_completed():
                # It failed, or it came to its end as this slice did.
                work.wait(_AT_ONCE)
                return True
            if self._channel is not None:
                self._channel.refuse_the_lost()
            return False
        return True

    def _translate(self, op: str, timeout: float | None, error: Exception) -> NoReturn:
        """Raise tcomm's error for one of torch's."""
        told = str(error).splitlines()[0] if str(error) else repr(error)
        if "nvalid scalar type" in told or "nsupported" in told or "not support" in told:
            raise CapabilityError(f"torch.distributed cannot do this {op}: {told}") from error
        if "onnection" in told and self._channel is not None:
            self._lose_the_dead(self._channel, error)
        kind: type[CommError] = PeerLostError if "onnection" in told else CommError
        if "imed out" in told or "imeout" in told:
            kind = PeerTimeoutError
            told = f"no answer for {timeout:g} s" if timeout else "no answer"
        raise kind(
            f"{op} of group {self._name!r} failed in torch.distributed: {told}",
            group=self._name,
            op=op,
            rank=self.rank,
        ) from error

    def _lose_the_dead(self, channel: Channel, error: Exception) -> None:
        """Raise for the peers that are gone; a connection may break before its process has ended."""
        deadline = time.monotonic() + _DYING_SECONDS
        while time.monotonic() < deadline:
            if gone := channel.find_gone():
                try:
                    channel.lose(gone, channel.words[Word.EPOCH])
                except PeerLostError as lost:
                    raise lost from error
            time.sleep(0.01)

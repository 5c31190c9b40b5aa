"""Which ranks a low-latency exchange goes on without, as its user sees it."""

from __future__ import annotations

import functools
import logging

import torch

from tcomm.errors import ConfigError, PeerTimeoutError, UsageError
from tcomm.groups.handle import SETUP_SECONDS
from tcomm.groups.moe.low_latency_calls import LowLatencyHandle
from tcomm.groups.moe.results import Results
from tcomm.groups.moe.workspace import Workspace
from tcomm.memory.base import Exchange
from tcomm.memory.channel import Channel
from tcomm.memory.control import Word
from tcomm.memory.device_arena import DeviceArena
from tcomm.memory.survivors import Survivors
from tcomm.signature import CallDescription

__all__ = ["Masks"]

logger = logging.getLogger("tcomm")


class Masks:
    """The masks of an exchange.

    Args:
        workspace: of the exchange.
        exchange: of its ranks, for nothing else.
        results: of the exchange.
    """

    def __init__(self, workspace: Workspace, exchange: Exchange, results: Results) -> None:
        self._space = workspace
        self._results = results
        self._exchange = exchange
        arena = workspace.arena
        self._device_arena = arena if isinstance(arena, DeviceArena) else None
        host = workspace.host_arena.channel
        self.survivors = Survivors(host, workspace.config.shm_dir, self._device_arena)
        """By what the ranks agree on who takes part."""

    @property
    def on_timeout(self) -> str:
        """What becomes of a rank that is dead, or misses a deadline; the same on every rank, between calls.

        With `raise`, the default, it is named and the exchange is over; with `mask` the others go on
        without it, for which the host waits in each call, also where tokens are on a GPU.

        Raises:
            ConfigError: when it is set to something else.
        """
        return "mask" if self.survivors.masks_late else "raise"

    @on_timeout.setter
    def on_timeout(self, chosen: str) -> None:
        if chosen not in {"raise", "mask"}:
            raise ConfigError(f"on_timeout={chosen!r} is neither 'raise' nor 'mask'")
        self.survivors.masks_late = chosen == "mask"

    def update(self, rank: int, is_masked: bool) -> None:
        """Mask a rank, or let it take part again. Not collective, but the same on all that go on.

        In a call that is open, who is masked is not waited for any more.

        Raises:
            UsageError: when a rank is to take part again in a call that is open, or while a result is alive
                that was received without it.
            ConfigError: when it is no other rank, or one that has made other calls since it was masked.
            CapabilityError: while a graph is captured.
        """

        def update() -> None:
            if not is_masked and rank in self.survivors.masked:
                self._refuse_half_a_part(rank)
            self.survivors.set_masked(rank, is_masked)

        self._space.run(update)

    def _refuse_half_a_part(self, rank: int) -> None:
        """Raise where a rank that takes part again would find a call, or a result, that lacks its rows."""
        if self._space.is_open:
            raise UsageError(
                f"a call is open, in which rank {rank} has no part; call its hook on every rank before "
                "that rank takes part again"
            )
        for handle in self._results.alive:
            if isinstance(handle, LowLatencyHandle) and rank in (handle.missing or ()):
                raise UsageError(
                    f"a result of dispatch #{handle.number} is alive that has no rows of rank {rank}; "
                    "combine it, or drop its handle, on every rank before that rank takes part again"
                )

    def query(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """[R] int32: 1 for each rank that is masked, into `out` where there is one.

        Raises:
            ConfigError: when `out` is something else.
        """
        shape = (self._space.world_size,)
        if out is None:
            out = torch.empty(shape, dtype=torch.int32, device=self._space.device)
        if tuple(out.shape) != shape or out.dtype != torch.int32:
            raise ConfigError(f"out is {out.dtype} {list(out.shape)}; give int32 {list(shape)}")
        masked = self.survivors.masked
        return out.copy_(torch.tensor([int(rank in masked) for rank in range(*shape)], device="cpu"))

    @property
    def faults(self) -> list[tuple[int, tuple[int, ...]]]:
        """(call, ranks) for each call that went on without ranks which it had begun with; since `clean`."""
        return list(self.survivors.faults)

    def query_fault(self) -> torch.Tensor:
        """Bool scalar: whether a call has masked a rank since `clean`."""
        return torch.tensor(bool(self.faults), device=self._space.device)

    def clean(self) -> None:
        """Let all ranks take part again. **Collective** among all of them, masked ones too.

        Results of before are alive no more: they may lack rows of those that were masked.

        Raises:
            PeerLostError: when a rank is dead or gone: it cannot come back.
            PeerLostError, PeerTimeoutError: when the group was given up.
            RendezvousError: when a rank did not come.
            CapabilityError: while a graph is captured.
        """
        self._space.run(self._clean)

    def _clean(self) -> None:
        space, host, device = self._space, self._space.host_arena, self._device_arena
        space.arena.runtime.refuse_in_capture("all ranks have to meet")
        self._complete_what_is_open(host.channel)
        host.channel.name_call(CallDescription("clean_mask"))
        self._refuse_the_lost(host.channel)
        mine = max(host.channel.words[Word.EPOCH], self.survivors.epoch_of(space.rank))
        check = functools.partial(self._refuse_the_lost, host.channel)
        told = self._exchange.all_gather(str(mine).encode(), SETUP_SECONDS, check)
        # Late stores of whoever was behind carry epochs before these.
        epoch = max(int(epoch) for epoch in told) + 2
        host.set_epoch(epoch)
        if device is not None:
            device.set_epoch(epoch)
        self.survivors.forget()
        self._results.clear()
        self._exchange.all_gather(b"", SETUP_SECONDS, check)

    def _complete_what_is_open(self, channel: Channel) -> None:
        """Complete a call that was left open, unless the others have gone on without this rank."""
        if channel.is_left_out:
            channel.words[Word.MASKED] = channel.words[Word.EPOCH] + 2
        try:
            self._space.drain()
        except PeerTimeoutError as error:
            if not channel.words[Word.MASKED]:
                raise
            logger.warning("the call that was open at clean_mask has no result: %s", error)

    def _refuse_the_lost(self, channel: Channel) -> None:
        """Raise when not all can come; the others go on as before."""
        if channel.words[Word.POISON_CODE]:
            channel.raise_poison()
        if gone := channel.find_gone():
            raise channel.lost(gone, channel.words[Word.EPOCH])

    def close(self) -> None:
        """Leave nothing behind."""
        self.survivors.close()

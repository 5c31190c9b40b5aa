"""Which ranks a low-latency exchange goes on without, as its user sees it."""

from __future__ import annotations

import functools

import torch

from tcomm.errors import CapabilityError, ConfigError, UsageError
from tcomm.groups.handle import SETUP_SECONDS
from tcomm.groups.moe.workspace import Workspace
from tcomm.memory.arena import Arena
from tcomm.memory.base import Exchange
from tcomm.memory.channel import Channel
from tcomm.memory.control import Word
from tcomm.memory.survivors import Survivors
from tcomm.signature import CallDescription

__all__ = ["Masks"]


class Masks:
    """The masks of an exchange.

    Args:
        workspace: of the exchange.
        exchange: of its ranks, for nothing else.
    """

    def __init__(self, workspace: Workspace, exchange: Exchange) -> None:
        self._space = workspace
        self._exchange = exchange
        self._survivors: Survivors | None = None
        arena = workspace.arena
        if isinstance(arena, Arena):
            self._survivors = Survivors(arena.channel, workspace.config.shm_dir)

    @property
    def on_timeout(self) -> str:
        """What becomes of a rank that is dead, or misses a deadline; the same on every rank, between calls.

        With `raise`, the default, it is named and the exchange is over; with `mask` the others go on
        without it.

        Raises:
            ConfigError: when it is set to something else.
            CapabilityError: when kernels on a GPU are to mask.
        """
        return "mask" if self._survivors is not None and self._survivors.masks_late else "raise"

    @on_timeout.setter
    def on_timeout(self, chosen: str) -> None:
        if chosen not in {"raise", "mask"}:
            raise ConfigError(f"on_timeout={chosen!r} is neither 'raise' nor 'mask'")
        if chosen == "mask" or self._survivors is not None:
            self.survivors.masks_late = chosen == "mask"

    @property
    def survivors(self) -> Survivors:
        """By what the ranks agree on who takes part.

        Raises:
            CapabilityError: on a GPU.
        """
        if self._survivors is None:
            raise CapabilityError(
                f"tokens on {self._space.device}: ranks are masked where tokens are in host memory only; "
                "make a new group of those that are left"
            )
        return self._survivors

    @property
    def are_possible(self) -> bool:
        """Whether ranks can be masked: where the host sees the words by which they wait."""
        return self._survivors is not None

    def update(self, rank: int, is_masked: bool) -> None:
        """Mask a rank, or let it take part again. Not collective, but the same on all that go on.

        In a call that is open, who is masked is not waited for any more.

        Raises:
            UsageError: when a rank is to take part again in a call that is open.
            ConfigError: when it is no other rank, or one that has made other calls since it was masked.
            CapabilityError: on a GPU.
        """
        survivors = self.survivors

        def update() -> None:
            if not is_masked and rank in survivors.masked and self._space.is_open:
                raise UsageError(
                    f"a call is open, in which rank {rank} has no part; call its hook on every rank before "
                    "that rank takes part again"
                )
            survivors.set_masked(rank, is_masked)

        self._space.run(update)

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
        masked = self._survivors.masked if self._survivors is not None else ()
        return out.copy_(torch.tensor([int(rank in masked) for rank in range(*shape)], device="cpu"))

    @property
    def faults(self) -> list[tuple[int, tuple[int, ...]]]:
        """(call, ranks) for each call that went on without ranks which it had begun with; since `clean`."""
        return list(self._survivors.faults) if self._survivors is not None else []

    def query_fault(self) -> torch.Tensor:
        """Bool scalar: whether a call has masked a rank since `clean`."""
        return torch.tensor(bool(self.faults), device=self._space.device)

    def clean(self) -> None:
        """Let all ranks take part again. **Collective** among all of them, masked ones too.

        Raises:
            PeerLostError: when a rank is dead or gone: it cannot come back.
            PeerLostError, PeerTimeoutError: when the group was given up.
            RendezvousError: when a rank did not come.
            CapabilityError: on a GPU.
        """
        survivors = self.survivors
        self._space.run(lambda: self._clean(survivors))

    def _clean(self, survivors: Survivors) -> None:
        arena = self._space.arena
        assert isinstance(arena, Arena)
        self._space.drain()
        arena.channel.name_call(CallDescription("clean_mask"))
        self._refuse_the_lost(arena.channel)
        mine = arena.channel.words[Word.EPOCH]
        check = functools.partial(self._refuse_the_lost, arena.channel)
        told = self._exchange.all_gather(str(mine).encode(), SETUP_SECONDS, check)
        # Late stores of whoever was behind carry epochs before these.
        arena.set_epoch(max(int(epoch) for epoch in told) + 2)
        survivors.forget()
        self._exchange.all_gather(b"", SETUP_SECONDS, check)

    def _refuse_the_lost(self, channel: Channel) -> None:
        """Raise when not all can come; the others go on as before."""
        if channel.words[Word.POISON_CODE]:
            channel.raise_poison()
        if gone := channel.find_gone():
            raise channel.lost(gone, channel.words[Word.EPOCH])

    def close(self) -> None:
        """Leave nothing behind."""
        if self._survivors is not None:
            self._survivors.close()

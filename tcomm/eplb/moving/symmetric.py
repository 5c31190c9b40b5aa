"""Moving weights through memory that the ranks of one node share. Protocol: `docs/eplb/moving.md`."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import torch

from tcomm.eplb.migration import Copy, LayerMoves
from tcomm.eplb.moving.device_work import DeviceWork
from tcomm.eplb.moving.rows import LayerRows, rows_to_give, write_rows
from tcomm.errors import CollectiveMismatchError, CommError, PeerTimeoutError, UsageError
from tcomm.groups.arguments import UNSET, Timeout, Unset
from tcomm.groups.moe.workspace import Workspace
from tcomm.groups.setup import Membership
from tcomm.memory.channel import Channel
from tcomm.memory.control import PoisonCode, Word
from tcomm.memory.verdicts import Verdicts
from tcomm.signature import CallDescription

__all__ = ["SymmetricMover"]

_COMMIT, _KEEP = "commit", "keep"


class SymmetricMover:
    """A `WeightMover` whose ranks read one another's rows where they lie. **Collective** to create.

    Args:
        members: who takes part.
        weights: of one layer on this rank, in host memory or on a GPU.
        timeout: of waits: seconds, a profile, or None: as long as the peers live. Ranks that have begun to
            move a layer together have half of it to give their rows.

    Attributes:
        space: the memory, and how much was read from others in it.

    Raises:
        ConfigError: when the weights are none that can be moved.
        CapabilityError: on every rank, when they share no memory, or have too little.
        GroupMismatchError, RendezvousError: as `Workspace` does.
    """

    def __init__(
        self, members: Membership, weights: Sequence[torch.Tensor], *, timeout: Timeout | Unset = UNSET
    ) -> None:
        self._rows = LayerRows.of(weights)
        # Rows lie across both halves: a layer takes two calls, and uses the memory once.
        half, device = -(-self._rows.nbytes // 2), self._rows.device
        self.space = Workspace(members, half, timeout=timeout, device=device)
        # Hosts tell one another also where rows lie on GPUs: nobody has to launch anything to wait.
        self._channel = self.space.host_arena.channel
        self._work = DeviceWork(device)
        self._verdicts = Verdicts(self._channel, self.space.config.shm_dir)
        # Who drops a mover, or ends with it, removes its verdicts too.
        self._release = weakref.finalize(self, _release, self._channel, self._verdicts)
        self._prepared: tuple[int, LayerMoves] | None = None
        self._agreed_epoch = 0
        self._pid = os.getpid()
        whole = ((rank, 0, 0, (self._rows.nbytes,), torch.uint8) for rank in range(self.space.world_size))
        self._staged = [self._rows.views_of(self.space.view(*each)) for each in whole]

    def prepare(self, layer: int, moves: LayerMoves, weights: Sequence[torch.Tensor]) -> None:
        """See `WeightMover.prepare`. **Collective.**"""
        rows = self._rows.bytes_of(weights)
        self.space.run(lambda: self._prepare(layer, moves, rows))

    def _prepare(self, layer: int, moves: LayerMoves, rows: list[torch.Tensor]) -> None:
        space = self.space
        self._prepared = None
        self._work.wait_for_weights()
        self._meet(self._rows.call("take_experts", layer, moves, "shared"))
        with torch.inference_mode():
            for row in rows_to_give(moves, space.rank, self._rows.num_slots):
                for staged, weight in zip(self._staged[space.rank], rows, strict=True):
                    staged[row].copy_(weight[row])
        self._work.wait_for_rows()
        self._agree(self._rows.call("give_experts", layer, moves, "shared"))
        self._prepared = layer, moves

    def _meet(self, call: CallDescription) -> None:
        """Wait until nobody reads the last layer's rows any more, and all are to move the same."""
        epoch = self.space.begin(call, self.space.timeout)
        self.space.publish(epoch, call)
        self.space.await_peers(epoch, call)
        self._verdicts.drop(epoch)
        self.space.finish(epoch)

    def _agree(self, call: CallDescription) -> None:
        """Tell that the rows are there, and return or raise as all others do."""
        space = self.space
        # Who has agreed already may wait in the next call, and must not be the first to lose patience there.
        seconds = None if space.timeout is None else space.timeout / 2
        epoch = space.begin(call, seconds)
        space.publish(epoch, call)
        try:
            space.await_peers(epoch, call)
        except CollectiveMismatchError:
            # Then nobody has seen equal calls of all, and nobody can have agreed.
            raise
        except CommError as error:
            told = self._proposal(error)
            if self._verdicts.propose(told, epoch) == told:
                raise
        except BaseException:
            self._verdicts.propose(f"{PoisonCode.INTERRUPTED:d}.{space.rank}", epoch)
            raise
        else:
            self._verdicts.propose(_COMMIT, epoch)
        verdict = self._verdicts.find(epoch)
        assert verdict is not None
        if verdict != _COMMIT:
            code, culprit = map(int, verdict.split("."))
            raise self._channel.poisoned(PoisonCode(code), culprit, epoch)
        space.finish(epoch)
        self._agreed_epoch = epoch

    @staticmethod
    def _proposal(error: CommError) -> str:
        code = PoisonCode.PEER_TIMEOUT if isinstance(error, PeerTimeoutError) else PoisonCode.PEER_LOST
        return f"{code:d}.{error.peers[0]}"

    def settle(self, is_agreed: bool) -> bool:
        """See `WeightMover.settle`."""
        if self._prepared is None:
            raise UsageError("settle without a layer that was prepared; prepare it first")
        told = _COMMIT if is_agreed else _KEEP
        # Asked of the next call: who has not begun that one may still ask, though it has completed this one.
        return self._verdicts.propose(told, self._agreed_epoch + 1, number=1) == _COMMIT

    def commit(self, layer: int, moves: LayerMoves, weights: Sequence[torch.Tensor]) -> None:
        """See `WeightMover.commit`. Local."""
        if self._prepared != (layer, moves):
            raise UsageError(f"commit of layer {layer}, which was not prepared; prepare it first")
        write_rows(self._rows.bytes_of(weights), moves, self.space.rank, self._brought)
        self._work.note_weights()
        self._prepared = None

    def _brought(self, copy: Copy) -> list[torch.Tensor]:
        size = self._rows.num_slots
        if copy.source // size != self.space.rank:
            self.space.traffic.wire_nbytes += sum(self._rows.row_nbytes)
        return [staged[copy.source % size] for staged in self._staged[copy.source // size]]

    def reserve(self, weights: Sequence[torch.Tensor]) -> None:
        """See `WeightMover.reserve`. **Collective.**"""
        self._rows.bytes_of(weights)
        self.space.run(self._reserve)

    def _reserve(self) -> None:
        self._prepared = None
        self._work.wait_for_weights()
        self._meet(self._rows.call("reserve_experts", -1, LayerMoves((), (), (), ()), "shared"))
        with torch.inference_mode():
            for staged in self._staged[self.space.rank]:
                staged.zero_()
        self._work.wait_for_rows()

    def close(self) -> None:
        """See `WeightMover.close`."""
        if self._pid != os.getpid():
            # A forked child inherits it, and its parent has not left.
            return
        peers = [peer for peer in self._channel.peers if not self._channel.is_gone(peer)]
        self.space.close()
        self._verdicts.close(peers)
        self._release.detach()


def _release(channel: Channel, verdicts: Verdicts) -> None:
    # A forked child drops what it inherits, and its parent has not left.
    if channel.words[Word.PID] == os.getpid():
        peers = [peer for peer in channel.peers if not channel.is_gone(peer)]
        channel.pages[channel.rank].leave("its mover was dropped without close()")
        verdicts.close(peers)

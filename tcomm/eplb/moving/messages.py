"""Moving weights by messages, between ranks that share no memory. Protocol: `docs/eplb/moving.md`."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence

import torch

from tcomm.eplb.migration import Copy, LayerMoves
from tcomm.eplb.moving.communicator import EplbCommunicator
from tcomm.eplb.moving.meeting import Meeting
from tcomm.eplb.moving.rows import LayerRows, write_rows
from tcomm.errors import CollectiveMismatchError, CommError, PeerLostError, UsageError
from tcomm.groups.setup import Membership
from tcomm.signature import CallDescription, decode_description

__all__ = ["MessageMover", "bring_rows"]

_LOOK_SECONDS = 0.02
_CLOSING_SECONDS = 2.0


class MessageMover:
    """A `WeightMover` that sends rows through a communicator, into a buffer of one layer.

    Args:
        members: who takes part; they meet in their store.
        weights: of one layer on this rank.
        communicator: what sends and receives.
        seconds: of one `prepare`; None: as long as it takes.

    Attributes:
        buffer: what a layer's rows are received in.

    Raises:
        ConfigError: when the weights are none that can be moved.
    """

    def __init__(
        self,
        members: Membership,
        weights: Sequence[torch.Tensor],
        communicator: EplbCommunicator,
        seconds: float | None,
    ) -> None:
        self._rows = LayerRows.of(weights)
        self._meeting = Meeting(members)
        self._communicator = communicator
        self._seconds = seconds
        self.buffer = torch.empty(self._rows.nbytes, dtype=torch.uint8, device=self._rows.device)
        self._brought = self._rows.views_of(self.buffer)
        self._prepared: tuple[int, LayerMoves] | None = None
        self._end = ""
        self._untold: CommError | None = None
        self._thread: threading.Thread | None = None

    def prepare(self, layer: int, moves: LayerMoves, weights: Sequence[torch.Tensor]) -> None:
        """See `WeightMover.prepare`. **Collective.**"""
        rows = self._rows.bytes_of(weights)
        self._prepared = None
        call = self._rows.call("move_experts", layer, moves, "messages")
        self._communicator.set_transfer_context(None, layer)
        self._agree(
            call, lambda: bring_rows(self._communicator, moves, rows, self._brought, self._meeting.rank)
        )
        self._prepared = layer, moves

    def _agree(self, call: CallDescription, run: Callable[[], None]) -> None:
        """Do something on every rank, and return or raise as all others do."""
        if self._end and self._untold is None:
            raise PeerLostError(f"moving experts is over since {self._end}; build a new group")
        deadline = None if self._seconds is None else time.monotonic() + self._seconds
        meeting = self._meeting
        meeting.begin()
        try:
            untold, self._untold = self._untold, None
            if untold is not None:
                raise untold
            self._compare(call, meeting.gather("before", call.encode(), deadline))
            self._watch(run)
            meeting.gather("after", b"", deadline)
            meeting.commit()
        except CollectiveMismatchError:
            # All have gathered the same, and raise the same.
            raise
        except BaseException as error:
            self._end = str(error) or type(error).__name__
            if meeting.give_up(error) or not isinstance(error, CommError):
                raise
            # The others have all they need, and so has this rank; they learn of it in the next call.
            self._untold = error

    def _compare(self, call: CallDescription, told: Sequence[bytes]) -> None:
        calls = [decode_description(data) for data in told]
        others = [r for r, theirs in enumerate(calls) if theirs is None or theirs.signature != call.signature]
        if others:
            lines = "".join(f"\n  rank {r}: {c or 'an unreadable call'}" for r, c in enumerate(calls))
            raise CollectiveMismatchError(
                f"the ranks are to move different things{lines}\ngive all the same maps and kinds of weights",
                group=self._meeting.name, op=call.op, rank=self._meeting.rank, peers=others,
            )  # fmt: skip

    def _watch(self, run: Callable[[], None]) -> None:
        """Run what may wait for a peer, until it is done or the others have given up.

        In a thread of its own: gloo can be waited for only once, and without a look at anything else.
        """
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        device = self._rows.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def body() -> None:
            try:
                with torch.inference_mode(), torch.cuda.stream(stream):
                    run()
                done.set_result(None)
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                done.set_exception(error)

        self._thread = threading.Thread(target=body, name="tcomm-experts", daemon=True)
        self._thread.start()
        while not concurrent.futures.wait([done], _LOOK_SECONDS).done:
            self._meeting.refuse_verdict()
        done.result()

    def _rows_for(self, copy: Copy) -> list[torch.Tensor]:
        """Where the rows of a copy wait for `commit`."""
        return [brought[copy.target % self._rows.num_slots] for brought in self._brought]

    def settle(self, is_agreed: bool) -> bool:
        """See `WeightMover.settle`. Asks the group's store.

        Raises:
            UsageError: when no layer was prepared.
            PeerLostError: when the store is gone.
        """
        if self._prepared is None:
            raise UsageError("settle without a layer that was prepared; prepare it first")
        return self._meeting.settle(is_agreed)

    def commit(self, layer: int, moves: LayerMoves, weights: Sequence[torch.Tensor]) -> None:
        """See `WeightMover.commit`. Local."""
        if self._prepared != (layer, moves):
            raise UsageError(f"commit of layer {layer}, which was not prepared; prepare it first")
        write_rows(self._rows.bytes_of(weights), moves, self._meeting.rank, self._rows_for)
        self._prepared = None

    def reserve(self, weights: Sequence[torch.Tensor]) -> None:
        """See `WeightMover.reserve`. **Collective.**"""
        self._rows.bytes_of(weights)
        self._prepared = None
        call = self._rows.call("reserve_experts", -1, LayerMoves((), (), (), ()), "messages")
        self._agree(call, self._touch)

    def _touch(self) -> None:
        """Fill the buffer, and have the communicator take what it takes when it is first used."""
        self.buffer.zero_()
        meeting = self._meeting
        if self._communicator.needs_profile_buffer_reservation and meeting.world_size > 1:
            there, back = ((meeting.rank + step) % meeting.world_size for step in (1, -1))
            self._communicator.add_send([torch.zeros_like(self.buffer[:1])], there, -1)
            self._communicator.add_recv([self.buffer[:1]], back, -1)
            self._communicator.execute()

    def close(self) -> None:
        """See `WeightMover.close`. Waits a little for what was given up and still goes on."""
        self._end = self._end or "it was closed"
        if self._thread is not None:
            self._thread.join(_CLOSING_SECONDS)


def bring_rows(
    communicator: EplbCommunicator,
    moves: LayerMoves,
    rows: Sequence[torch.Tensor],
    brought: Sequence[torch.Tensor],
    rank: int,
) -> None:
    """Send what others need, and put what this rank needs where it waits to be written. **Collective.**

    Args:
        communicator: what sends and receives, round by round.
        moves: what the layer needs.
        rows: [slots, bytes] of each weight.
        brought: the same of a buffer; the row of a slot comes in the row of that slot.
        rank: this one.

    Raises:
        PeerLostError, PeerTimeoutError: from the communicator.
    """
    size = len(rows[0])
    for copy in moves.local:
        if copy.target // size == rank:
            for new, row in zip(brought, rows, strict=True):
                new[copy.target % size].copy_(row[copy.source % size])
    for round_ in moves.rounds:
        for copy in round_:
            if copy.source // size == rank:
                given = [row[copy.source % size] for row in rows]
                communicator.add_send(given, copy.target // size, copy.expert)
            if copy.target // size == rank:
                taken = [new[copy.target % size] for new in brought]
                communicator.add_recv(taken, copy.source // size, copy.expert)
        communicator.execute()

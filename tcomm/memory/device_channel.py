"""The host's side of kernels on a GPU: the order of calls, and what kernels put down about their waits.

Nothing here waits for the device, except `synchronize`. A kernel tells of a failed wait in a record in pinned
host memory, which is read before and after every launch; the host tells kernels to stop waiting in a word of
the same record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from tcomm.errors import (
    CollectiveMismatchError,
    CommError,
    GroupClosedError,
    PeerLostError,
    PeerTimeoutError,
)
from tcomm.memory.call_notes import CallNotes
from tcomm.memory.channel import Channel
from tcomm.memory.control import HOST_WORDS, ErrorKind, HostWord, PoisonCode, Word
from tcomm.memory.runtime import Runtime, StreamOrder
from tcomm.memory.wait import pause_since
from tcomm.memory.watch import Watch
from tcomm.signature import CallDescription

__all__ = ["DeviceChannel"]

_SIGNATURE_MASK = 0xFFFFFFFF
_SPOILED = 1
"""What is changed in a word by which a kernel over nodes passes a disagreement on."""
_RECORD_SECONDS = 0.05
_LOOKS_BEFORE_GONE = 2


class DeviceChannel:
    """One rank's end of a group on GPUs. Used by one thread at a time, besides its watch.

    Args:
        group: name, for errors.
        rank: this process, within the group.
        world_size: number of ranks.
        page: [words] int64, this rank's page on the device.
        runtime: of the device.
        settle: waits until the device has done all that it was given.
        host: the group's channel on this machine; None where the ranks share no host memory.
    """

    axis_rank = 0
    """A launch of this rank works for no other."""

    def __init__(
        self,
        group: str,
        rank: int,
        world_size: int,
        page: torch.Tensor,
        runtime: Runtime,
        settle: Callable[[], None],
        host: Channel | None,
    ) -> None:
        self.group = group
        self.rank = rank
        self.world_size = world_size
        self.calls = 0
        """Calls that this host has launched; replays of graphs are not among them."""
        on_gpu = page.device.type != "cpu"
        self.record = torch.zeros(HOST_WORDS, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        """What kernels and this host tell one another."""
        self._record: memoryview[int] = self.record.numpy().data.cast("B").cast("Q")
        self._page = page
        self._waits_for_kernels = not on_gpu
        self._runtime = runtime
        self._settle = settle
        self._host = host
        self._notes = [CallNotes(p) for p in host.pages] if host is not None else []
        self._order = StreamOrder(runtime, group)
        self._call = CallDescription("")
        self._timeout: float | None = None
        self._failure: CommError | None = None
        self._clear_is_due = False
        self._gone: list[int] = []
        self._looks_since_gone = 0
        self._waiting_on: tuple[int, int, int] | None = None
        self._began = 0.0
        self._watch = Watch(self, f"tcomm-watch-{group}") if host is not None else None

    # Around a launch -----------------------------------------------------------------------------

    def begin(self, call: CallDescription, timeout: float | None) -> int:
        """Order a call after those before it, note it for the peers, and count it.

        Args:
            call: what is launched.
            timeout: seconds that each of its waits may take; None: while the peers live.

        Raises:
            PeerLostError, PeerTimeoutError: when the group was given up; from now on, at every call.
            CapabilityError: when two graphs are captured at once.
        """
        self._raise_if_over()
        self._order.enter()
        if self._clear_is_due:
            self._clear()
        self.calls += 1
        self._call, self._timeout, self._waiting_on = call, timeout, None
        if self._notes:
            self._notes[self.rank].put(self.calls, call)
        return self.calls

    def after_kernel(self, epoch: int, everyone: bool = False) -> None:
        """Raise what is known by now, without waiting.

        A mismatch is raised here only where kernels have run to their end, in the interpreter. On a GPU the
        ranks learn of it at different calls; they stay in step because each of them makes the call during
        which it learns of it, and raises behind it: `raise_recorded`.
        """
        del epoch, everyone
        if self._waits_for_kernels:
            self.raise_recorded()
        else:
            self._raise_if_over()

    def kernel_pause(self, phase: int, block: int, word: int) -> int:
        """Called by an interpreted kernel between two polls: 0 to go on, 1 to stop waiting."""
        now = time.monotonic()
        if self._waiting_on != (phase, block, word):
            self._waiting_on, self._began = (phase, block, word), now
        late = self._timeout is not None and now - self._began >= self._timeout
        if late or self._record[HostWord.ABORT]:
            return 1
        pause_since(self._began)
        return 0

    def raise_recorded(self) -> None:
        """Raise what kernels have put down so far. Reads host memory only, and waits for nothing.

        Raises:
            CollectiveMismatchError: the group stays usable.
            PeerLostError, PeerTimeoutError: it does not.
        """
        self._raise_if_over()
        error = self._record[HostWord.ERROR]
        if error:
            self._raise_mismatch(error >> 8 & 0xFF)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given, and raise what it found.

        Raises:
            CapabilityError: while a graph is captured.
            CommError: as `raise_recorded` does.
        """
        self._runtime.refuse_in_capture("the device has to be waited for")
        self._settle()
        self.raise_recorded()

    def leave_out(self, ranks: int) -> None:
        """Let kernels leave ranks out, from the next launch or replay on. Waits for nothing.

        Args:
            ranks: a bit for each.

        Raises:
            CapabilityError: while a graph is captured.
        """
        self._runtime.refuse_in_capture("ranks are left out from now on")
        self._order.enter()
        self._page[Word.LEFT_OUT] = ranks

    def start_again(self) -> None:
        """Forget that the others went on without this rank. With nothing in flight; all ranks take part."""
        self._failure = None
        self._record[HostWord.ABORT] = 0
        if self._record[HostWord.ERROR] & 0xFF == ErrorKind.TIMEOUT:
            self._record[HostWord.EXPECTED] = self._record[HostWord.SEEN] = 0
            self._record[HostWord.ERROR] = ErrorKind.NONE
            self._page[Word.ERROR_KIND] = ErrorKind.NONE

    # The end of the group ------------------------------------------------------------------------

    def abort(self) -> None:
        """Make every kernel of this rank that waits give up. Nothing takes it back."""
        self._record[HostWord.ABORT] = 1

    def look(self) -> bool:
        """Look after the peers once, in the thread of the watch; True when waits were ended for good."""
        host = self._host
        if host is None:
            return True
        if host.words[Word.POISON_CODE]:
            self.abort()
            return True
        # Kernels do not wait for ranks left out, nor for lost ones where the hosts agree on those before.
        left_out = -1 if host.breaks_off_alone else host.words[Word.LEFT_OUT]
        gone = [peer for peer in host.find_gone() if not left_out >> peer & 1]
        # What a peer published before it went may be under way still.
        self._looks_since_gone = self._looks_since_gone + 1 if gone else 0
        if self._looks_since_gone < _LOOKS_BEFORE_GONE:
            return False
        self._gone = gone
        self.abort()
        return True

    def close(self, reason: str) -> None:
        """Stop the watch; from now on every call raises. May be called twice."""
        if self._watch is not None:
            self._watch.stop()
        if not isinstance(self._failure, GroupClosedError):
            told = f"group {self.group!r} cannot be used: {reason}"
            self._failure = self._error(GroupClosedError, told, self.calls, ())

    def _raise_if_over(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        error, host = self._record[HostWord.ERROR], self._host
        is_late = error & 0xFF == ErrorKind.TIMEOUT
        # Whoever gave the group up knew why, and may have left since.
        if host is not None and host.words[Word.POISON_CODE]:
            self._failure = self._given_up_by_another(host)
        elif (is_late or self._gone) and host is not None and host.is_left_out:
            self._failure = self._left_out(host)
        elif is_late:
            self._failure = self._timed_out(error >> 8 & 0xFF)
        elif self._gone:
            self._failure = self._lost(self._gone, self.calls)
        else:
            return
        self.abort()
        raise self._failure

    def _timed_out(self, peer: int) -> CommError:
        """The error for a wait that ended without `peer`."""
        seq, host = self._seen_words()[0] >> 32, self._host
        if host is not None:
            if gone := self._gone or host.find_gone():
                return self._lost(gone, seq)
            host.give_up(PoisonCode.PEER_TIMEOUT, peer, seq)
        what = host.blame(peer) if host is not None else f"rank {peer} is silent"
        limit = "being told to stop" if self._timeout is None else f"{self._timeout:g} s"
        told = (
            f"{self._call.op} #{seq} of group {self.group!r} timed out on a GPU after {limit} on rank "
            f"{self.rank}: {what}; find out what it does, or call with a longer timeout="
        )
        return self._error(PeerTimeoutError, told, seq, [peer])

    def _left_out(self, host: Channel) -> CommError:
        """The error for a wait for ranks that go on without this one: for it alone, until `start_again`."""
        host.words[Word.MASKED] = self.calls + 1
        told = host.left_out(self.calls)
        return self._error(type(told), str(told), self.calls, [self.rank])

    def _lost(self, peers: Sequence[int], seq: int) -> CommError:
        host = self._host
        why = f"ranks {list(peers)} are gone"
        if host is not None:
            host.give_up(PoisonCode.PEER_LOST, peers[0], seq)
            why = "; ".join(host.blame(peer) for peer in peers)
        told = f"{self._call.op} #{seq} of group {self.group!r} cannot complete: {why}"
        return self._error(PeerLostError, told, seq, peers)

    def _given_up_by_another(self, host: Channel) -> CommError:
        words = host.words
        code, culprit, seq = (
            words[Word.POISON_CODE],
            words[Word.POISON_RANK],
            words[Word.POISON_SEQ],
        )
        told = host.poisoned(PoisonCode(code), culprit, seq)
        return self._error(type(told), str(told), seq, [culprit])

    def _error(self, kind: type[CommError], told: str, seq: int, peers: Sequence[int]) -> CommError:
        return kind(told, group=self.group, op=self._call.op, seq=seq, rank=self.rank, peers=peers)

    # Mismatches ----------------------------------------------------------------------------------

    def _raise_mismatch(self, peer: int) -> None:
        """Raise for calls that differ, and go on with the next one."""
        expected, seen = self._seen_words()
        told, peers = self._compare(expected, seen, peer)
        record = self._record
        record[HostWord.EXPECTED] = record[HostWord.SEEN] = 0
        record[HostWord.ERROR] = ErrorKind.NONE
        self._clear()
        raise self._error(CollectiveMismatchError, told, expected >> 32, peers)

    def _seen_words(self) -> tuple[int, int]:
        """The words behind an error, which may become visible a moment after it."""
        record, began = self._record, time.monotonic()
        while not record[HostWord.EXPECTED] and time.monotonic() - began < _RECORD_SECONDS:
            time.sleep(0)
        return record[HostWord.EXPECTED], record[HostWord.SEEN]

    def _compare(self, expected: int, seen: int, peer: int) -> tuple[str, list[int]]:
        """A line for every rank, and the ranks that differ as far as that is known."""
        epoch, mine = expected >> 32, expected & _SIGNATURE_MASK
        lines = [f"call #{epoch} of group {self.group!r} on GPUs: the ranks called different things"]
        known = self._notes[self.rank].find(mine) if self._notes else None
        if seen & _SIGNATURE_MASK == mine ^ _SPOILED:
            # It called the same, and had heard of a rank that did not.
            lines.append(f"  rank {peer} heard of it from another rank")
            seen = expected
        others = []
        for rank in range(self.world_size):
            signature: int | None = {self.rank: mine, peer: seen & _SIGNATURE_MASK}.get(rank)
            call = self._call if signature == mine == self._call.signature else None
            if self._notes and signature is not None:
                found = self._notes[rank].find(signature)
                call = found[1] if found else call
            elif known is not None and (note := self._notes[rank].at(known[0])) is not None:
                signature, call = note
            if signature not in (None, mine):
                others.append(rank)
            lines.append(f"  rank {rank}: {call if call is not None else _unknown(signature)}")
        if self.calls > epoch and not self._waits_for_kernels:
            lines.append(f"what was called from #{epoch} to now has no result that can be relied on")
        lines.append("make the ranks call the same thing; the group stays usable")
        return "\n".join(lines), others

    def _clear(self) -> None:
        """Let kernels put an error down again: behind all that was launched, and not into a graph."""
        self._clear_is_due = bool(self._runtime.capture_id(self._runtime.current_stream()))
        if not self._clear_is_due:
            self._page[Word.ERROR_KIND] = ErrorKind.NONE


def _unknown(signature: int | None) -> str:
    return "not known here" if signature is None else f"a call of signature {signature:08x}"

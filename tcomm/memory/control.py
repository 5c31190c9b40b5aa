"""The control page: one per rank, mapped by every rank, readable by a third process while a job hangs.

All words are 64 bits and naturally aligned. The layout is a contract with the kernels and with other
versions of tcomm in the same job; `docs/memory-model.md` says who writes which word, and when.
"""

from __future__ import annotations

import enum

import torch

from tcomm.signature import CallDescription, decode_description

__all__ = [
    "ARRIVALS",
    "CONTROL_BYTES",
    "DEAD_EPOCH",
    "DEVICE_CALLS",
    "DEVICE_CALL_SLOTS",
    "DEVICE_CALL_WORDS",
    "EPOCH_MASK",
    "FAULTS",
    "HEADS",
    "HOST_WORDS",
    "LAYOUT_VERSION",
    "MAGIC",
    "MAILBOX_LINE",
    "MAILBOX_SLOTS",
    "MAX_BLOCKS",
    "MAX_PHASES",
    "MAX_WORLD_SIZE",
    "PROBES",
    "PROBE_WORDS",
    "RECEIVED",
    "RECEIVING_BLOCKS",
    "RENEWAL_MASK",
    "SENDING_BLOCKS",
    "SENT",
    "TAILS",
    "ControlPage",
    "ErrorKind",
    "HostWord",
    "PoisonCode",
    "Word",
    "arrival_index",
    "dead_word",
]

MAGIC = 0x74636F6D6D706167  # b"tcommpag"
LAYOUT_VERSION = 4
MAX_WORLD_SIZE = 16
MAX_BLOCKS = 32
MAX_PHASES = 2
EPOCH_MASK = 0xFFFFFFFF
RENEWAL_MASK = 0x3FFFFFFE
"""Epochs with none of these bits renew the words of the other parity: two calls out of every 2**30."""
DEAD_EPOCH = 1 << 31
"""Half a wrap away: a word that carries `epoch ^ DEAD_EPOCH` is nobody's arrival for 2**30 calls and more."""
CONTROL_BYTES = 32 * 1024


@enum.unique
class Word(enum.IntEnum):
    """Index of each single word, grouped by the cache line and by who writes it."""

    # Written once, by the owner.
    MAGIC = 0
    LAYOUT_VERSION = 1
    GENERATION = 2
    RANK = 3
    WORLD_SIZE = 4
    NONCE = 5
    PID = 6
    START_TIME = 7
    # Written by whoever gives the group up; the code last.
    POISON_CODE = 8
    POISON_RANK = 9
    POISON_SEQ = 10
    # Written by the owner while it waits, for those who ask what it is doing.
    SEQ = 16
    WAITING_FOR = 17
    LAST_PROGRESS_NS = 18
    LEFT = 19
    # A bit for each rank that the owner goes on without.
    LEFT_OUT = 20
    # Device state: kernels and the CPU path advance it.
    EPOCH = 24
    BLOCKS_DONE = 25
    ABORT = 26
    # Address of a `HostWord` record, where the page itself is out of the host's reach; else 0.
    HOST_RECORD = 27
    # [parity]: which of the descriptions is that of the owner's call.
    DESCRIBED = 28
    # Error record of a kernel; the kind is claimed first.
    ERROR_KIND = 32
    ERROR_PEER = 33
    ERROR_EXPECTED = 34
    ERROR_SEEN = 35
    ERROR_PHASE = 36
    ERROR_BLOCK = 37
    # Written by those who go on without the owner, or by it when it sees so: the epoch of that, plus one.
    MASKED = 56


@enum.unique
class HostWord(enum.IntEnum):
    """Index of each word of a record in pinned host memory: an error record, and a word that ends waits."""

    # kind | peer << 8 | phase << 16 | block << 24, in one store.
    ERROR = 0
    EXPECTED = 1
    SEEN = 2
    # Written by the host: a kernel that waits gives up.
    ABORT = 8


HOST_WORDS = 16
"""Words of such a record: two cache lines, the second written by the host."""

FAULTS = 40
"""[opener]: the last round in which a rank asked the others whom to go on without; written by that rank."""
REASON_WORD, REASON_BYTES = 64, 256
DESCRIPTIONS, DESCRIPTION_BYTES, DESCRIPTION_SLOTS = 128, 1024, 3
"""[slot]: length, and what a call is: two that peers may still ask for, and one for the next."""
ARRIVALS = 512
MAILBOXES = ARRIVALS + MAX_PHASES * 2 * MAX_BLOCKS * MAX_WORLD_SIZE
"""Counts of send and recv live from here on; collectives never touch them."""
MAILBOX_SLOTS = 4
"""Slots of the mailbox of a pair of ranks, and so the credits of its sender."""
MAILBOX_LINE = 8
"""Words from one head or tail to the next: a cache line for each peer that writes one."""
HEADS = MAILBOXES
"""[source]: slots that the source has filled for the owner; written by the source."""
TAILS = HEADS + MAX_WORLD_SIZE * MAILBOX_LINE
"""[destination]: slots of the owner's that the destination has emptied; written by the destination."""
SENT = TAILS + MAX_WORLD_SIZE * MAILBOX_LINE
"""[destination], without gaps: slots of all messages that the owner has sent."""
RECEIVED = SENT + MAX_WORLD_SIZE
"""[source], without gaps: slots of all messages that the owner has received."""
SENDING_BLOCKS = RECEIVED + MAX_WORLD_SIZE
"""[destination][slot]: blocks of a kernel that are done with a slot, of those that fill it together."""
RECEIVING_BLOCKS = SENDING_BLOCKS + MAX_WORLD_SIZE * MAILBOX_SLOTS
"""[source][slot]: likewise, of those that empty it together."""

PROBES, PROBE_WORDS = 2976, 4
"""[writer][4], of a page on a GPU: what each rank wrote there to prove that it can."""
DEVICE_CALLS, DEVICE_CALL_WORDS, DEVICE_CALL_SLOTS = 3072, 32, 32
"""[slot][32], of a page on the host: the calls that the owner launched last on its GPU."""

if (
    RECEIVING_BLOCKS + MAX_WORLD_SIZE * MAILBOX_SLOTS > PROBES
    or PROBES + MAX_WORLD_SIZE * PROBE_WORDS > DEVICE_CALLS
    or DEVICE_CALLS + DEVICE_CALL_SLOTS * DEVICE_CALL_WORDS > CONTROL_BYTES // 8
):
    raise AssertionError("the control page does not hold its own layout")


class PoisonCode(enum.IntEnum):
    """Why a group was given up. Sticky for a generation."""

    HEALTHY = 0
    PEER_LOST = 1
    PEER_TIMEOUT = 2
    INTERRUPTED = 3


class ErrorKind(enum.IntEnum):
    """What a kernel found while it waited."""

    NONE = 0
    MISMATCH = 1
    TIMEOUT = 2


def arrival_index(phase: int, parity: int, block: int, source: int) -> int:
    """Word in which rank `source` says that its block has come to `phase` of a call of that parity."""
    return ARRIVALS + ((phase * 2 + parity) * MAX_BLOCKS + block) * MAX_WORLD_SIZE + source


def dead_word(epoch: int) -> int:
    """An unsigned arrival word, or lane, that no call near `epoch` takes for its own."""
    return ((epoch & EPOCH_MASK) ^ DEAD_EPOCH) << 32


class ControlPage:
    """One rank's page, as seen by this process.

    Args:
        memory: [CONTROL_BYTES] uint8, the page itself.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self.bytes = memory.numpy().data
        self.words: memoryview[int] = self.bytes.cast("Q")
        """Every word, unsigned. A plain aligned 8-byte store or load on x86-64."""

    def initialise(self, rank: int, world_size: int, nonce: int, pid: int, start_time: int) -> None:
        """Fill in the owner's header; everything else is zero. The magic number comes last."""
        words = self.words
        words[Word.LAYOUT_VERSION] = LAYOUT_VERSION
        words[Word.RANK] = rank
        words[Word.WORLD_SIZE] = world_size
        words[Word.NONCE] = nonce
        words[Word.PID] = pid
        words[Word.START_TIME] = start_time
        words[Word.MAGIC] = MAGIC

    def matches(self, rank: int, nonce: int) -> bool:
        """Whether this is the page that `rank` made, and not other memory of the same name."""
        words = self.words
        return (
            words[Word.MAGIC] == MAGIC
            and words[Word.LAYOUT_VERSION] == LAYOUT_VERSION
            and words[Word.RANK] == rank
            and words[Word.NONCE] == nonce
        )

    def describe(self, slot: int, description: bytes) -> None:
        """Put down what this rank is going to call; nobody reads that slot until a call points to it."""
        start = DESCRIPTIONS * 8 + slot * DESCRIPTION_BYTES
        data = description[: DESCRIPTION_BYTES - 8]
        self.words[start // 8] = len(data)
        self.bytes[start + 8 : start + 8 + len(data)] = data

    def description(self, parity: int) -> CallDescription | None:
        """What the owner calls at epochs of `parity`, or None where it makes no sense."""
        slot = self.words[Word.DESCRIBED + parity] % DESCRIPTION_SLOTS
        start = DESCRIPTIONS * 8 + slot * DESCRIPTION_BYTES
        length = min(self.words[start // 8], DESCRIPTION_BYTES - 8)
        return decode_description(bytes(self.bytes[start + 8 : start + 8 + length]))

    def renew(self, parity: int, epoch: int) -> None:
        """Make every arrival word of `parity` nobody's; before this rank publishes `epoch`."""
        dead = dead_word(epoch)
        for phase in range(MAX_PHASES):
            start = arrival_index(phase, parity, 0, 0)
            for index in range(start, start + MAX_BLOCKS * MAX_WORLD_SIZE):
                self.words[index] = dead

    def leave(self, reason: str) -> None:
        """Say that the owner has left the group, and why. The first reason stays."""
        if self.words[Word.LEFT]:
            return
        data = reason.encode()[: REASON_BYTES - 1]
        start = REASON_WORD * 8
        self.bytes[start : start + len(data)] = data
        self.bytes[start + len(data)] = 0
        self.words[Word.LEFT] = 1

    @property
    def leaving_reason(self) -> str | None:
        """Why the owner left, or None while it is here."""
        if not self.words[Word.LEFT]:
            return None
        start = REASON_WORD * 8
        data = bytes(self.bytes[start : start + REASON_BYTES])
        return data.split(b"\0", 1)[0].decode(errors="replace")

    def poison(self, code: PoisonCode, rank: int, seq: int) -> None:
        """Give the group up, unless somebody already has."""
        if self.words[Word.POISON_CODE]:
            return
        self.words[Word.POISON_RANK] = rank
        self.words[Word.POISON_SEQ] = seq
        self.words[Word.POISON_CODE] = code

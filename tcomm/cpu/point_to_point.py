"""Send and recv on a CPU: the protocol of `tcomm.kernels.point_to_point`, prepared once per kind of message.

A plan holds everything that does not change between messages: addresses of the slots, the header, which words
to look at and which to write. What is left for a short message is two copies and two words.

The bytes in a mailbox are those of the kernels, so either end may run either engine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tcomm.cpu.copies import memcpy
from tcomm.memory.control import HEADS, MAILBOX_LINE, MAILBOX_SLOTS, RECEIVED, SENT, TAILS
from tcomm.memory.mailbox import Mailboxes, Message

__all__ = ["TransferPlan", "make_recv", "make_send"]

TransferPlan = Callable[[torch.Tensor, "float | None"], None]
"""Takes a contiguous tensor of the planned shape and dtype, and the timeout in seconds. Raises what
`PairWait.begin` and `PairWait.until` raise."""


def make_send(mailboxes: Mailboxes, dst: int, message: Message) -> TransferPlan:
    """Prepare to send tensors whose kind is `message` to rank `dst`."""
    channel = mailboxes.channel
    rank, words, theirs = channel.rank, channel.words, channel.pages[dst].words
    wait = mailboxes.wait_of("send", dst)
    begin, until = wait.begin, wait.until
    header, addresses = message.header, mailboxes.payload_addresses(dst, rank)
    headers = tuple(whole[: len(header)] for whole in mailboxes.headers(dst, rank))
    tail, head, own = TAILS + dst * MAILBOX_LINE, HEADS + rank * MAILBOX_LINE, SENT + dst
    slot_bytes, total = mailboxes.layout.slot_bytes, message.nbytes
    first_nbytes, rest = min(total, slot_bytes), range(slot_bytes, total, slot_bytes)

    def run(x: torch.Tensor, timeout: float | None) -> None:
        sent = begin(timeout)
        start = x.data_ptr()
        if words[tail] + MAILBOX_SLOTS <= sent:
            until(sent + 1)
        slot = sent % MAILBOX_SLOTS
        headers[slot][:] = header
        memcpy(addresses[slot], start, first_nbytes)
        sent += 1
        theirs[head] = sent
        words[own] = sent
        for offset in rest:
            if words[tail] + MAILBOX_SLOTS <= sent:
                until(sent + 1)
            memcpy(addresses[sent % MAILBOX_SLOTS], start + offset, min(slot_bytes, total - offset))
            sent += 1
            theirs[head] = sent
            words[own] = sent

    return run


def make_recv(mailboxes: Mailboxes, src: int, message: Message) -> TransferPlan:
    """Prepare to receive tensors whose kind is `message` from rank `src`.

    The plan also raises CollectiveMismatchError: when the next message is another one, which stays.
    """
    channel = mailboxes.channel
    rank, words, theirs = channel.rank, channel.words, channel.pages[src].words
    wait = mailboxes.wait_of("recv", src)
    begin, until = wait.begin, wait.until
    signature, total = message.signature, message.nbytes
    addresses = mailboxes.payload_addresses(rank, src)
    headers = tuple(whole.cast("Q") for whole in mailboxes.headers(rank, src))
    head, tail, own = HEADS + src * MAILBOX_LINE, TAILS + rank * MAILBOX_LINE, RECEIVED + src
    slot_bytes = mailboxes.layout.slot_bytes
    first_nbytes, rest = min(total, slot_bytes), range(slot_bytes, total, slot_bytes)

    def run(out: torch.Tensor, timeout: float | None) -> None:
        received = begin(timeout)
        if words[head] <= received:
            until(received + 1)
        slot = received % MAILBOX_SLOTS
        header = headers[slot]
        if header[0] != signature or header[1] != total:
            raise mailboxes.mismatch(src, message)
        start = out.data_ptr()
        memcpy(start, addresses[slot], first_nbytes)
        received += 1
        theirs[tail] = received
        words[own] = received
        for offset in rest:
            if words[head] <= received:
                until(received + 1)
            memcpy(start + offset, addresses[received % MAILBOX_SLOTS], min(slot_bytes, total - offset))
            received += 1
            theirs[tail] = received
            words[own] = received

    return run

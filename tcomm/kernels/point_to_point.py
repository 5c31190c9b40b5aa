"""Send and recv: out on one rank = x on another, through the 4 slots of a mailbox in the receiver's memory.

Needs: x and out contiguous, of the same dtype and shape. Any dtype: bytes are moved. Only the two ranks take
part: neither epochs nor arrival words are touched, and the other end may be the CPU path.

A piece of a message is a slot: its sender waits for a credit, its receiver for the head. The blocks of a
launch share each slot, tile by tile; the last of them to be done with it publishes. Nobody waits for another
block, except that a slot is not filled again before all are done with it: with four slots, programs that run
one after another (the interpreter) have to be one program.

Source: the credits of NCCL's SIMPLE protocol, and the counts in device memory of torchcomms' p2p kernels.

Meaning: `out.copy_(x)`. Contract: `docs/memory-model.md`, section 9.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from tcomm.errors import ConfigError
from tcomm.interpret import is_interpreted
from tcomm.kernels.device import launched_rank, page_of, pause, pointer_to, started, tell_host
from tcomm.kernels.hooks import interpreting
from tcomm.kernels.launch import grid_of, launches, refuse_host_memory, tile_numel
from tcomm.kernels.partition import as_flat_words
from tcomm.kernels.tiles import copy_span
from tcomm.memory import control
from tcomm.memory.arena import Arena
from tcomm.memory.control import ErrorKind, Word
from tcomm.memory.mailbox import HEADER_BYTES, MailboxLayout, Message, PairWait

__all__ = ["mailbox_constants", "recv", "send"]

_RUNTIME = ["nbytes", "signature", "peer", "rank", "budget"]
_BUDGET = 0
"""Polls of a wait; 0: only the host's clock counts."""

_HEADS = tl.constexpr(control.HEADS)
_TAILS = tl.constexpr(control.TAILS)
_LINE = tl.constexpr(control.MAILBOX_LINE)
_SLOTS = tl.constexpr(control.MAILBOX_SLOTS)
_SENT = tl.constexpr(control.SENT)
_RECEIVED = tl.constexpr(control.RECEIVED)
_SENDING_BLOCKS = tl.constexpr(control.SENDING_BLOCKS)
_RECEIVING_BLOCKS = tl.constexpr(control.RECEIVING_BLOCKS)
_ERROR_KIND = tl.constexpr(int(Word.ERROR_KIND))
_ERROR_PEER = tl.constexpr(int(Word.ERROR_PEER))
_ERROR_EXPECTED = tl.constexpr(int(Word.ERROR_EXPECTED))
_ERROR_SEEN = tl.constexpr(int(Word.ERROR_SEEN))
_ERROR_BLOCK = tl.constexpr(int(Word.ERROR_BLOCK))
_MISMATCH = tl.constexpr(int(ErrorKind.MISMATCH))
_TIMEOUT = tl.constexpr(int(ErrorKind.TIMEOUT))
_HEADER_BYTES = tl.constexpr(HEADER_BYTES)
_ALIGNMENT = 16


@triton.jit(do_not_specialize=_RUNTIME)
def _send_kernel(
    x_ptr,  # [nbytes] uint8, at a multiple of 16
    header_ptr,  # [HEADER_BYTES / 8] int64
    nbytes: tl.int64, mailbox_ptrs, pad_ptrs,  # [W] int64, symmetric
    peer, rank, budget: tl.int64,
    SLOT_BYTES: tl.constexpr, BLOCK: tl.constexpr, ATOMIC_POLL: tl.constexpr,
):  # fmt: skip
    """Cut x into the slots of this rank's mailbox at `peer`, each filled as soon as there is a credit for it.

    Example: slots of 8 bytes, 3 sent before, x=[7, 8] int64 -> slot 3: header, [7]; slot 0: [8]; head 5.
    """
    rank = launched_rank(rank)
    peer = peer.to(tl.int64)
    page = page_of(pad_ptrs, rank)
    head_ptr = page_of(pad_ptrs, peer) + _HEADS + rank * _LINE
    sent = tl.load(page + _SENT + peer)
    pieces = tl.maximum(tl.cdiv(nbytes, SLOT_BYTES), 1)
    piece = tl.full((), 0, tl.int64)
    stopped = tl.full((), 0, tl.int32)
    while (piece < pieces) & (stopped == 0):
        turn = sent + piece
        stopped = _await_count(page, _TAILS + peer * _LINE, _SLOTS, turn + 1, peer, budget, ATOMIC_POLL)
        if stopped == 0:
            offset = _slot_offset(rank, turn, SLOT_BYTES)
            if (piece == 0) & (tl.program_id(0) == 0):
                words = tl.arange(0, _HEADER_BYTES // 8)
                slot_ptr = pointer_to(mailbox_ptrs, peer, offset, tl.int64)
                tl.store(slot_ptr + words, tl.load(header_ptr + words))
            start = piece * SLOT_BYTES
            dst_ptr = pointer_to(mailbox_ptrs, peer, offset + _HEADER_BYTES, tl.uint8)
            _copy_bytes(x_ptr + start, dst_ptr, tl.minimum(nbytes - start, SLOT_BYTES), BLOCK)
            blocks_ptr = page + _SENDING_BLOCKS + peer * _SLOTS + turn % _SLOTS
            _advance(blocks_ptr, page + _SENT + peer, head_ptr, turn + 1, piece == pieces - 1)
        piece += 1


def send(x: torch.Tensor, arena: Arena, dst: int, *, timeout: float | None = 120.0) -> None:
    """Send x to rank `dst`, which receives a tensor of this dtype and shape, by whichever engine.

    Args:
        x: any shape and dtype, contiguous.
        arena: of the group.
        dst: another rank.
        timeout: seconds that it may wait; None: while the peer lives.

    Raises:
        ConfigError: when x is not contiguous; nothing was sent.
        CapabilityError: when there is nothing to run it on.
        PeerLostError, PeerTimeoutError: from the wait for credits; see `PairWait`.
    """
    dense = _bytes_of(x)
    wait = arena.mailboxes.wait_of("send", dst)
    message = _message_of(x)
    padded = message.header.ljust(HEADER_BYTES, b"\0")
    header = torch.frombuffer(bytearray(padded), dtype=torch.int64)
    _launch(_send_kernel, arena, wait, timeout, dense, header, message.nbytes)
    wait.after_kernel()


@triton.jit(do_not_specialize=_RUNTIME)
def _recv_kernel(
    out_ptr,  # [nbytes] uint8, at a multiple of 16
    signature: tl.int64,
    nbytes: tl.int64, mailbox_ptrs, pad_ptrs,  # [W] int64, symmetric
    peer, rank, budget: tl.int64,
    SLOT_BYTES: tl.constexpr, BLOCK: tl.constexpr, ATOMIC_POLL: tl.constexpr,
):  # fmt: skip
    """Empty the slots that `peer` fills, in order, into out; nothing when its header is of another message.

    Example: slots of 8 bytes, 3 received before; slot 3: header, [7]; slot 0: [8] -> out=[7, 8]; tail 5.
    """
    rank = launched_rank(rank)
    peer = peer.to(tl.int64)
    page = page_of(pad_ptrs, rank)
    tail_ptr = page_of(pad_ptrs, peer) + _TAILS + rank * _LINE
    received = tl.load(page + _RECEIVED + peer)
    pieces = tl.maximum(tl.cdiv(nbytes, SLOT_BYTES), 1)
    piece = tl.full((), 0, tl.int64)
    stopped = tl.full((), 0, tl.int32)
    while (piece < pieces) & (stopped == 0):
        turn = received + piece
        stopped = _await_count(page, _HEADS + peer * _LINE, 0, turn + 1, peer, budget, ATOMIC_POLL)
        offset = _slot_offset(peer, turn, SLOT_BYTES)
        if (stopped == 0) & (piece == 0):
            header_ptr = pointer_to(mailbox_ptrs, rank, offset, tl.int64)
            theirs = tl.load(header_ptr)
            if (theirs != signature) | (tl.load(header_ptr + 1) != nbytes):
                _record(page, _MISMATCH, peer, signature, theirs)
                stopped += 1
        if stopped == 0:
            start = piece * SLOT_BYTES
            src_ptr = pointer_to(mailbox_ptrs, rank, offset + _HEADER_BYTES, tl.uint8)
            _copy_bytes(src_ptr, out_ptr + start, tl.minimum(nbytes - start, SLOT_BYTES), BLOCK)
            blocks_ptr = page + _RECEIVING_BLOCKS + peer * _SLOTS + turn % _SLOTS
            _advance(blocks_ptr, page + _RECEIVED + peer, tail_ptr, turn + 1, piece == pieces - 1)
        piece += 1


def recv(out: torch.Tensor, arena: Arena, src: int, *, timeout: float | None = 120.0) -> torch.Tensor:
    """Receive the next message of rank `src` into `out`.

    Args:
        out: of the dtype and shape of what was sent, contiguous.
        arena: of the group.
        src: another rank.
        timeout: seconds that it may wait; None: while the peer lives.

    Returns:
        `out`.

    Raises:
        ConfigError: when out is not contiguous; nothing was received.
        CapabilityError: when there is nothing to run it on.
        CollectiveMismatchError: when the next message has another dtype or shape; it stays.
        PeerLostError, PeerTimeoutError: from the wait for the message; see `PairWait`.
    """
    dense = _bytes_of(out)
    wait = arena.mailboxes.wait_of("recv", src)
    message = _message_of(out)
    _launch(_recv_kernel, arena, wait, timeout, dense, message.signature, message.nbytes)
    if not wait.after_kernel():
        raise arena.mailboxes.mismatch(src, message)
    if dense.data_ptr() != out.data_ptr():
        out.copy_(dense.view(out.dtype).view(out.shape))
    return out


@triton.jit
def _slot_offset(source, turn, SLOT_BYTES: tl.constexpr):
    """Where the header of the slot of that turn lies in a receiver's buffer."""
    return (source * _SLOTS + turn % _SLOTS) * (_HEADER_BYTES + SLOT_BYTES)


@triton.jit
def _await_count(page, index, CREDITS: tl.constexpr, wanted, peer, budget, ATOMIC_POLL: tl.constexpr):
    """Wait until a peer's count and `CREDITS` come to `wanted`; 0 when so, else 1 and an error record.

    Bounded as `await_peers` is. The record's kind stops the other blocks, too; it is polled together with the
    count, so that all warps leave the loop for the same reason.
    """
    lanes = tl.arange(0, 2)
    words = page + tl.where(lanes == 0, index, _ERROR_KIND)
    least = wanted - CREDITS
    # Not polled ahead of the loop: LLVM (Triton 3.6, AMD) would merge both polls into a loop with two
    # entries, where one lane waits for the rest of its wave.
    state = tl.full((), 1, tl.int32)
    since = started(ATOMIC_POLL)
    polls = tl.full((), 0, tl.int64)
    given_up = tl.full((), 0, tl.int32)
    while (state == 1) & (given_up == 0):
        given_up = pause(0, tl.program_id(0), wanted, page, polls, since, budget, ATOMIC_POLL)
        polls += 1
        state = _poll(words, lanes, least, ATOMIC_POLL)
    # The polls above order nothing; this reads the count again, with acquire.
    seen = tl.atomic_add(words, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    count = tl.sum(tl.where(lanes == 0, seen, 0), axis=0)
    is_late = count < least
    if is_late:
        _record(page, _TIMEOUT, peer, wanted, count)
    return is_late.to(tl.int32)


@triton.jit
def _poll(words, lanes, least, ATOMIC_POLL: tl.constexpr):
    """1 while the count in lane 0 is below `least`; 2 more when lane 1 has the kind of an error."""
    if ATOMIC_POLL:
        seen = tl.atomic_add(words, 0, sem="acquire", scope="sys")
    else:
        seen = tl.load(words, volatile=True)
    state = tl.where(lanes == 0, (seen < least).to(tl.int32), 2 * (seen != 0).to(tl.int32))
    return tl.sum(state, axis=0)


@triton.jit
def _record(page, kind: tl.constexpr, peer, expected, seen):
    """Put the first error of a call into the error record; later ones are lost on purpose."""
    claim = tl.full((), kind, tl.int64)
    before = tl.atomic_cas(page + _ERROR_KIND, tl.full((), 0, tl.int64), claim, scope="sys")
    if before == 0:
        tl.store(page + _ERROR_PEER, peer)
        tl.store(page + _ERROR_EXPECTED, expected)
        tl.store(page + _ERROR_SEEN, seen)
        tl.store(page + _ERROR_BLOCK, tl.program_id(0).to(tl.int64))
        tell_host(page, claim, peer, expected, seen, tl.full((), 0, tl.int64))


@triton.jit
def _advance(blocks_ptr, own_ptr, their_ptr, count, is_last):
    """This block is done with a slot; the last block of the launch that is says so to the peer.

    Only the last piece moves this rank's own count: then every block has read it.
    """
    tl.debug_barrier()
    done = tl.atomic_add(blocks_ptr, 1, sem="acq_rel", scope="gpu")
    if done == tl.num_programs(0) - 1:
        tl.store(blocks_ptr, 0)
        if is_last:
            tl.store(own_ptr, count)
        tl.debug_barrier()
        tl.atomic_xchg(their_ptr, count, sem="release", scope="sys")


@triton.jit
def _copy_bytes(src_ptr, dst_ptr, nbytes, BLOCK: tl.constexpr):
    """dst[i] = src[i] for i < nbytes, 8 bytes at a time; both begin at multiples of 16."""
    src_words = tl.multiple_of(src_ptr.to(tl.pointer_type(tl.int64), bitcast=True), 16)
    dst_words = tl.multiple_of(dst_ptr.to(tl.pointer_type(tl.int64), bitcast=True), 16)
    copy_span(src_words, dst_words, nbytes // 8, BLOCK)
    if tl.program_id(0) == 0:
        offs = nbytes // 8 * 8 + tl.arange(0, 8)
        tl.store(dst_ptr + offs, tl.load(src_ptr + offs, mask=offs < nbytes), mask=offs < nbytes)


def mailbox_constants(layout: MailboxLayout, atomic_poll: bool) -> dict[str, Any]:
    """Compile-time arguments of both kernels."""
    tile = min(tile_numel(8), triton.next_power_of_2(layout.slot_bytes // 8))
    return {"SLOT_BYTES": layout.slot_bytes, "BLOCK": tile, "ATOMIC_POLL": atomic_poll}


def _bytes_of(x: torch.Tensor) -> torch.Tensor:
    """[nbytes] uint8 over x, or over a copy of it where x lies at an odd address."""
    if not x.is_contiguous():
        raise ConfigError("a kernel needs a contiguous tensor; call .contiguous() first")
    flat = as_flat_words(x).view(torch.uint8)
    return flat if flat.data_ptr() % _ALIGNMENT == 0 else flat.clone()


def _message_of(x: torch.Tensor) -> Message:
    return Message(str(x.dtype).removeprefix("torch."), x.shape, x.numel() * x.itemsize)


def _launch(kernel: Any, arena: Arena, wait: PairWait, timeout: float | None, *args: Any) -> None:
    refuse_host_memory()
    mailboxes = arena.mailboxes
    constants = mailbox_constants(mailboxes.layout, torch.version.hip is not None)
    num_tiles = triton.cdiv(mailboxes.layout.slot_bytes // 8, constants["BLOCK"])
    num_blocks = 1 if is_interpreted() else grid_of(num_tiles)
    wait.begin(timeout)
    launches[kernel.__name__] += 1
    with interpreting(wait):
        kernel[(num_blocks,)](
            *args,
            mailboxes.buffer.table,
            arena.control.table,
            wait.peer,
            arena.rank,
            _BUDGET,
            **constants,
        )

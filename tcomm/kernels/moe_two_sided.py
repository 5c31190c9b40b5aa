"""The two-sided exchange of tokens: rows stream through rings with credits, both ways at once.

Needs: tables of which rows go where, whose counts fit together on all ranks. A program works for one peer
and one lane: it sends while it has credits and receives what has come, so that no two wait for each other.
Programs go through the peers in the order of their ranks, which lets programs that run one after another
(the interpreter) meet: every rank comes to the pairs of ranks in the same order.

Once all ranks have published the call, nobody waits for more than one peer at a time. A rank that has sent
and received everything says so in the arrival words of phase 1, for those who want to know whether a silent
peer is lost.

Source: FlashInfer's two-sided exchange, with counts of slots that only grow in place of FIFOs to be reset.

Meaning: `tcomm.cpu.moe_two_sided`.
"""

import torch
import triton
import triton.language as tl

from tcomm.errors import CapabilityError, ConfigError
from tcomm.kernels.device import (
    INTERPRETED,
    arrivals_of,
    is_aborted,
    launched_rank,
    page_of,
    pause,
    pointer_to,
    record_late,
    row_of,
    started,
)
from tcomm.kernels.launch import launch_part
from tcomm.kernels.moe_counts import open_call, take_counts
from tcomm.kernels.moe_row_tables import copy_rows, row_constants, table_of
from tcomm.kernels.phases import await_ranks, open_word
from tcomm.memory import control
from tcomm.memory.base import KernelArena
from tcomm.memory.control import Word
from tcomm.memory.rings import HEAD, RECEIVED, RING_SLOTS, SENT, TAIL, Pieces, RingLayout
from tcomm.memory.wait import SET_SHIFT
from tcomm.signature import CallDescription

__all__ = ["announce", "exchange_rows", "ring_constants"]

_RUNTIME = ["rank", "signature", "budget", "x_stride", "out_stride", "capacity"]
_Table = tuple[torch.Tensor, torch.Tensor]

_EPOCH = tl.constexpr(int(Word.EPOCH))
_BLOCKS_DONE = tl.constexpr(int(Word.BLOCKS_DONE))
_EPOCH_MASK = tl.constexpr(control.EPOCH_MASK)
_SET_SHIFT = tl.constexpr(SET_SHIFT)
_HEAD, _TAIL = tl.constexpr(HEAD), tl.constexpr(TAIL)
_SENT, _RECEIVED = tl.constexpr(SENT), tl.constexpr(RECEIVED)
_SLOTS = tl.constexpr(RING_SLOTS)
_DONE_PHASE = tl.constexpr(1)


def announce(
    counts: torch.Tensor, arena: KernelArena, call: CallDescription, timeout: float | None
) -> torch.Tensor:
    """Tell every rank how many rows it will get from this one. **Collective.**

    Args:
        counts: [W] int64, for each rank; of virtual ranks [W, W].
        arena: of the group.
        call: what the ranks compare.
        timeout: seconds.

    Returns:
        Of the shape of counts: rows from each rank.

    Raises:
        CapabilityError: when there is nothing to run it on.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    epoch = open_call(counts, arena, call, timeout)
    received = torch.empty_like(counts)
    take_counts(received, arena, call, timeout, epoch)
    return received


@triton.jit(do_not_specialize=_RUNTIME)
def _stream_rows_kernel(
    x_ptr, out_ptr,  # [rows, ROW_WORDS] integers
    x_stride, out_stride,
    given_ptr, num_given_ptr,  # [W, capacity] and [W] int64: rows of x for each rank
    taken_ptr, num_taken_ptr,  # likewise, rows of out from each rank
    capacity, staging_ptrs, pad_ptrs, signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, NUM_LANES: tl.constexpr, SLOT_BYTES: tl.constexpr, WORDS_AT: tl.constexpr,
    SLOTS_AT: tl.constexpr, WIDTH: tl.constexpr, PIECE_ROWS: tl.constexpr, ROW_WORDS: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Wait for all ranks to have called; move the pieces of this lane to and from one peer.

    Example: W=2, slots of 2 rows; rank 0: x=[[5], [6], [7]], given [_, [0, 1, 2]], taken [_, [1]]; rank 1:
    x=[[9]], given [[0], _] -> slots of rank 1 [5, 6], [7], head 2; of rank 0 [9]; out of rank 0 [_, 9].
    """
    rank = launched_rank(rank)
    page = page_of(pad_ptrs, rank)
    word = open_word(page, signature)
    x_ptr = row_of(x_ptr, x_stride, rank, VIRTUAL)
    out_ptr = row_of(out_ptr, out_stride, rank, VIRTUAL)
    peer = tl.program_id(0).to(tl.int64) % WORLD
    lane = tl.program_id(0).to(tl.int64) // WORLD
    given_ptr = table_of(given_ptr, WORLD * capacity, rank, VIRTUAL) + peer * capacity
    taken_ptr = table_of(taken_ptr, WORLD * capacity, rank, VIRTUAL) + peer * capacity
    num_given = tl.load(table_of(num_given_ptr, WORLD, rank, VIRTUAL) + peer)
    num_taken = tl.load(table_of(num_taken_ptr, WORLD, rank, VIRTUAL) + peer)
    own = pointer_to(staging_ptrs, rank, 2 * LANE_HALF_BYTES, tl.int64)
    theirs = pointer_to(staging_ptrs, peer, 2 * LANE_HALF_BYTES, tl.int64)
    tail = WORDS_AT + ((_TAIL * WORLD + peer) * NUM_LANES + lane) * 8
    head = WORDS_AT + ((_HEAD * WORLD + peer) * NUM_LANES + lane) * 8
    own_words = WORDS_AT + (peer * NUM_LANES + lane) * 8
    their_words = WORDS_AT + (rank * NUM_LANES + lane) * 8
    KIND: tl.constexpr = WORLD * NUM_LANES * 8
    sent = tl.load(own + own_words + _SENT * KIND)
    received = tl.load(own + own_words + _RECEIVED * KIND)
    to_send = _num_pieces(num_given, lane, NUM_LANES, PIECE_ROWS, WIDTH, ROW_WORDS)
    to_take = _num_pieces(num_taken, lane, NUM_LANES, PIECE_ROWS, WIDTH, ROW_WORDS)
    out_done = tl.full((), 0, tl.int64)
    in_done = tl.full((), 0, tl.int64)
    stopped = await_ranks(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL).to(tl.int32)
    if (peer == rank) & (stopped == 0):
        _keep_rows(
            x_ptr, out_ptr, given_ptr, taken_ptr, num_given, lane, NUM_LANES, ROW_WORDS, COLS, ROWS, UNIT
        )
        stopped += 1
    while ((out_done < to_send) | (in_done < to_take)) & (stopped == 0):
        emptied = tl.atomic_add(own + tail, 0, sem="acquire", scope="sys")
        filled = tl.atomic_add(own + head, 0, sem="acquire", scope="sys")
        tl.debug_barrier()
        may_send = (out_done < to_send) & (sent + out_done < emptied + _SLOTS)
        may_take = (in_done < to_take) & (received + in_done < filled)
        if may_send:
            slot_ptr = _slot(theirs, rank, lane, sent + out_done, x_ptr, NUM_LANES, SLOT_BYTES, SLOTS_AT)
            _copy_piece(
                x_ptr, slot_ptr, given_ptr, num_given, out_done, lane, True,
                NUM_LANES, PIECE_ROWS, WIDTH, ROW_WORDS, COLS, ROWS, UNIT,
            )  # fmt: skip
            out_done += 1
            _publish_count(theirs + their_words + _HEAD * KIND, sent + out_done)
        if may_take:
            slot_ptr = _slot(own, peer, lane, received + in_done, out_ptr, NUM_LANES, SLOT_BYTES, SLOTS_AT)
            _copy_piece(
                out_ptr, slot_ptr, taken_ptr, num_taken, in_done, lane, False,
                NUM_LANES, PIECE_ROWS, WIDTH, ROW_WORDS, COLS, ROWS, UNIT,
            )  # fmt: skip
            in_done += 1
            _publish_count(theirs + their_words + _TAIL * KIND, received + in_done)
        if (may_send | may_take) == 0:
            stopped = _await_change(page, own, tail, head, emptied, filled, peer, word, budget, ATOMIC_POLL)
    tl.store(own + own_words + _SENT * KIND, sent + out_done)
    tl.store(own + own_words + _RECEIVED * KIND, received + in_done)
    _end_call(page, pad_ptrs, rank, word, WORLD, LANES)


@triton.jit
def _num_pieces(
    num_rows, lane, NUM_LANES: tl.constexpr, PIECE_ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ROW_WORDS: tl.constexpr,
):  # fmt: skip
    """Pieces of a lane: groups of rows go to the lanes in turn."""
    groups = tl.cdiv(num_rows, PIECE_ROWS)
    return tl.cdiv(tl.maximum(groups - lane, 0), NUM_LANES) * tl.cdiv(ROW_WORDS, WIDTH)


@triton.jit
def _slot(
    words, source, lane, turn, x_ptr, NUM_LANES: tl.constexpr, SLOT_BYTES: tl.constexpr,
    SLOTS_AT: tl.constexpr,
):  # fmt: skip
    """Pointer to the slot of that turn in the ring of a source, in elements of x."""
    slot = (source * NUM_LANES + lane) * _SLOTS + turn % _SLOTS
    address = words.to(tl.int64) + SLOTS_AT + slot * SLOT_BYTES
    return tl.multiple_of(address.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)


@triton.jit
def _copy_piece(
    x_ptr, slot_ptr, rows_ptr, num_rows, piece, lane, TO_SLOT: tl.constexpr,
    NUM_LANES: tl.constexpr, PIECE_ROWS: tl.constexpr, WIDTH: tl.constexpr, ROW_WORDS: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Copy a piece between the rows of x that a table names and a slot, where they follow one another."""
    COLUMNS: tl.constexpr = (ROW_WORDS + WIDTH - 1) // WIDTH
    group = lane + piece // COLUMNS * NUM_LANES
    column = piece % COLUMNS * WIDTH
    first = group * PIECE_ROWS
    count = tl.minimum(num_rows - first, PIECE_ROWS)
    row = tl.full((), 0, tl.int64)
    while row < count:
        rows = row + tl.arange(0, ROWS)
        named = tl.load(rows_ptr + first + rows, mask=rows < count, other=0)
        in_x = tl.multiple_of(x_ptr + named * ROW_WORDS + column, UNIT)
        in_slot = tl.multiple_of(slot_ptr + rows * WIDTH, UNIT)
        for start in tl.static_range(0, WIDTH, COLS):
            cols = start + tl.arange(0, COLS)
            mask = (rows < count)[:, None] & ((cols < WIDTH) & (column + cols < ROW_WORDS))[None, :]
            if TO_SLOT:
                tl.store(
                    in_slot[:, None] + cols[None, :],
                    tl.load(in_x[:, None] + cols[None, :], mask=mask),
                    mask=mask,
                )
            else:
                tl.store(
                    in_x[:, None] + cols[None, :],
                    tl.load(in_slot[:, None] + cols[None, :], mask=mask),
                    mask=mask,
                )
        row += ROWS


@triton.jit
def _keep_rows(
    x_ptr, out_ptr, given_ptr, taken_ptr, num_rows, lane, NUM_LANES: tl.constexpr,
    ROW_WORDS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Copy the rows that this rank gives to itself."""
    row = lane * ROWS
    while row < num_rows:
        rows = row + tl.arange(0, ROWS)
        inside = rows < num_rows
        src = x_ptr + tl.load(given_ptr + rows, mask=inside, other=0) * ROW_WORDS
        dst = out_ptr + tl.load(taken_ptr + rows, mask=inside, other=0) * ROW_WORDS
        copy_rows(tl.multiple_of(src, UNIT), tl.multiple_of(dst, UNIT), inside, ROW_WORDS, COLS)
        row += NUM_LANES * ROWS


@triton.jit
def _publish_count(count_ptr, count):
    """Tell a peer how many slots are filled or emptied, with all that this program wrote or read."""
    tl.debug_barrier()
    tl.atomic_xchg(count_ptr, count, sem="release", scope="sys")


@triton.jit
def _await_change(page, own, tail, head, emptied, filled, peer, word, budget, ATOMIC_POLL: tl.constexpr):
    """Wait until a peer has moved a count; 0 when it has, else 1 and an error record.

    Bounded as `await_peers` is. Each warp leaves the loop for a reason of its own; the counts, read again by
    all, say which it was.
    """
    lanes = tl.arange(0, 2)
    counts = own + tl.where(lanes == 0, tail, head)
    before = tl.where(lanes == 0, emptied, filled)
    done_ptr = page + arrivals_of(_DONE_PHASE, 0, word) + peer
    told = _DONE_PHASE | (1 << (peer + _SET_SHIFT))
    since = started(ATOMIC_POLL)
    polls = tl.full((), 0, tl.int64)
    waiting = tl.full((), 1, tl.int32)
    while waiting == 1:
        given_up = pause(told, 0, word, page, polls, since, budget, ATOMIC_POLL)
        polls += 1
        given_up = tl.where(is_aborted(page, word), 1, given_up)
        if INTERPRETED:
            # A peer that is done has done all that this rank waits for, so the host ends no wait for it.
            given_up = tl.where(tl.load(done_ptr) == word, 1, given_up)
        waiting = _unchanged(counts, before, ATOMIC_POLL) * (1 - given_up)
    tl.debug_barrier()
    tail_now = tl.atomic_add(own + tail, 0, sem="acquire", scope="sys")
    head_now = tl.atomic_add(own + head, 0, sem="acquire", scope="sys")
    is_late = (tail_now == emptied) & (head_now == filled)
    if is_late:
        record_late(page, peer, word)
    return is_late.to(tl.int32)


@triton.jit
def _unchanged(counts, before, ATOMIC_POLL: tl.constexpr):
    """1 while both counts are as before, else 0."""
    if ATOMIC_POLL:
        seen = tl.atomic_add(counts, 0, sem="acquire", scope="sys")
    else:
        seen = tl.load(counts, volatile=True)
    return (tl.sum((seen != before).to(tl.int32), axis=0) == 0).to(tl.int32)


@triton.jit
def _end_call(page, pad_ptrs, rank, word, WORLD: tl.constexpr, LANES: tl.constexpr):
    """Once all programs are done: tell the peers, unless one gave up, and advance the epoch."""
    tl.debug_barrier()
    done = tl.atomic_add(page + _BLOCKS_DONE, 1, sem="acq_rel", scope="sys")
    if done == tl.num_programs(0) - 1:
        tl.store(page + _BLOCKS_DONE, 0)
        if is_aborted(page, word) == 0:
            peers = tl.arange(0, LANES)
            mask = peers < WORLD
            pages = tl.load(pad_ptrs + peers, mask=mask, other=0).to(tl.pointer_type(tl.int64))
            words = tl.full((LANES,), 0, tl.int64) + word
            slot = arrivals_of(_DONE_PHASE, 0, word) + rank
            tl.debug_barrier()
            tl.atomic_xchg(pages + slot, words, mask=mask, sem="release", scope="sys")
        tl.store(page + _EPOCH, (word >> 32) & _EPOCH_MASK)


def ring_constants(layout: RingLayout, row_words: int, itemsize: int, num_rows: int) -> dict[str, int]:
    """Compile-time arguments of the kernel.

    Args:
        layout: of the rings.
        row_words: words of a row, at least one.
        itemsize: bytes of a word.
        num_rows: rows that a launch may have to move.
    """
    pieces = Pieces(row_words * itemsize, layout.slot_nbytes)
    return {
        **row_constants(row_words, itemsize, min(num_rows, pieces.num_rows)),
        "NUM_LANES": layout.num_lanes,
        "SLOT_BYTES": layout.slot_nbytes,
        "WORDS_AT": layout.words_at,
        "SLOTS_AT": layout.slots_at,
        "WIDTH": pieces.width // itemsize,
        "PIECE_ROWS": pieces.num_rows,
    }


def exchange_rows(
    x: torch.Tensor,
    out: torch.Tensor,
    outgoing: _Table,
    incoming: _Table,
    layout: RingLayout,
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
) -> None:
    """Send rows of x to other ranks, and put those that come from them into rows of out. **Collective.**

    Args:
        x: [rows, words], integers, contiguous; of virtual ranks [W, rows, words].
        out: [rows, words] of the same type; rows that nobody sends are not written.
        outgoing: [W, capacity] int64, which rows of x go to each rank, in order, and [W] int64, how many. Of
            virtual ranks both for each rank.
        incoming: likewise, which rows of out those from each rank become. What goes to this rank itself is
            copied.
        layout: of the rings in staging.
        arena: of the group.
        call: what the ranks compare, before anything moves.
        timeout: seconds that each wait may take.

    Raises:
        ConfigError: when the tables are of different capacity.
        CapabilityError: when there is nothing to run it on, or the device has too few processors.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the waits.
    """
    num_blocks = arena.world_size * layout.num_lanes
    if num_blocks > arena.max_blocks:
        raise CapabilityError(
            f"an exchange through rings of {layout.num_lanes} lanes takes {num_blocks} programs at once, and "
            f"the device has room for {arena.max_blocks}"
        )
    row_words = x.shape[-1]
    (given, num_given), (taken, num_taken) = outgoing, incoming
    if given.shape != taken.shape:
        raise ConfigError(f"tables of {list(given.shape)} and {list(taken.shape)}; needed one capacity")
    if not row_words:
        num_given, num_taken = torch.zeros_like(num_given), torch.zeros_like(num_taken)
    constants = ring_constants(layout, max(row_words, 1), x.itemsize, given.shape[-1])
    is_virtual = arena.is_virtual
    epoch = open_call(num_given, arena, call, timeout, counted=False)
    launch_part(
        _stream_rows_kernel, num_blocks, arena, call, timeout, epoch,
        x, out, x.stride(0) if is_virtual else 0, out.stride(0) if is_virtual else 0,
        given.contiguous(), num_given.contiguous(), taken.contiguous(), num_taken.contiguous(),
        given.shape[-1], **constants,
    )  # fmt: skip
    if epoch is not None:
        arena.channel.after_kernel(epoch)

import itertools

import pytest

from tcomm.memory import control
from tcomm.memory.control import CONTROL_BYTES, MAILBOX_LINE, MAILBOX_SLOTS, MAX_WORLD_SIZE
from tcomm.memory.mailbox import HEADER_BYTES, MailboxLayout, Message


def test_every_count_has_a_word_of_its_own_in_the_reserved_part_of_the_page():
    ranks = range(MAX_WORLD_SIZE)
    words = [start + rank * MAILBOX_LINE for start in (control.HEADS, control.TAILS) for rank in ranks]
    words += [start + rank for start in (control.SENT, control.RECEIVED) for rank in ranks]
    blocks = itertools.product(
        (control.SENDING_BLOCKS, control.RECEIVING_BLOCKS), ranks, range(MAILBOX_SLOTS)
    )
    words += [start + rank * MAILBOX_SLOTS + slot for start, rank, slot in blocks]
    assert len(set(words)) == len(words)
    assert min(words) == control.MAILBOXES
    assert max(words) < CONTROL_BYTES // 8


def test_heads_and_tails_of_different_writers_share_no_cache_line():
    ranks = range(MAX_WORLD_SIZE)
    words = [start + rank * MAILBOX_LINE for start in (control.HEADS, control.TAILS) for rank in ranks]
    assert len({word // 8 for word in words}) == len(words)
    assert max(words) // 8 < control.SENT // 8


@pytest.mark.parametrize("world_size", range(1, MAX_WORLD_SIZE + 1))
def test_slots_are_aligned_apart_and_cheap(world_size):
    layout = MailboxLayout(world_size)
    offsets = [layout.offset(source, slot) for source in range(world_size) for slot in range(MAILBOX_SLOTS)]
    assert all(b - a == HEADER_BYTES + layout.slot_bytes for a, b in itertools.pairwise(offsets))
    assert all(offset % 128 == 0 for offset in offsets)
    assert offsets[-1] + layout.stride == layout.nbytes <= 512 * 1024
    assert 4096 <= layout.slot_bytes == layout.slot_bytes // 4096 * 4096


def test_larger_worlds_have_smaller_slots():
    assert [MailboxLayout(w).slot_bytes for w in (1, 2, 3, 4, 8, 16)] == [
        65536,
        32768,
        20480,
        16384,
        8192,
        4096,
    ]


def test_a_header_tells_dtype_and_shape_apart_and_fits():
    headers = {Message(dtype, shape, 24).header for dtype in ("float32", "int32") for shape in ((6,), (2, 3))}
    assert len(headers) == 4
    assert Message("float32", (2, 3), 24).told == "float32 [2, 3]"
    assert len(Message("complex128", (2**62,) * 64, 2**62).header) <= HEADER_BYTES

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcomm.memory import control
from tcomm.memory.control import (
    CONTROL_BYTES,
    DEAD_EPOCH,
    EPOCH_MASK,
    MAX_BLOCKS,
    MAX_PHASES,
    MAX_WORLD_SIZE,
    RENEWAL_MASK,
    ControlPage,
    PoisonCode,
    Word,
    arrival_index,
    dead_word,
)
from tcomm.signature import CallDescription


def _page():
    return ControlPage(torch.zeros(CONTROL_BYTES, dtype=torch.uint8))


def test_every_arrival_word_is_its_own_and_outside_of_everything_else():
    axes = range(MAX_PHASES), range(2), range(MAX_BLOCKS), range(MAX_WORLD_SIZE)
    indices = [arrival_index(*place) for place in itertools.product(*axes)]
    assert len(set(indices)) == len(indices) == MAX_PHASES * 2 * MAX_BLOCKS * MAX_WORLD_SIZE
    assert min(indices) == control.ARRIVALS
    assert max(indices) == control.MAILBOXES - 1 < CONTROL_BYTES // 8


def test_single_words_reason_and_descriptions_are_disjoint():
    assert len({int(word) for word in Word}) == len(Word)
    reason = control.REASON_WORD + control.REASON_BYTES // 8
    descriptions = control.DESCRIPTIONS + control.DESCRIPTION_SLOTS * control.DESCRIPTION_BYTES // 8
    assert Word.DESCRIBED + 1 not in set(Word)
    assert max(Word) < control.REASON_WORD < reason <= control.DESCRIPTIONS < descriptions <= control.ARRIVALS


def test_words_of_different_writers_share_no_cache_line():
    lines = {}
    for name in ("MAGIC", "POISON_CODE", "SEQ", "EPOCH", "ERROR_KIND"):
        lines[name] = Word[name] // 8
    assert len(set(lines.values())) == len(lines)


def test_a_page_is_known_by_its_rank_and_nonce():
    page = _page()
    assert not page.matches(0, 0)
    page.initialise(3, 4, 12345, 99, 88)
    assert page.matches(3, 12345)
    assert not page.matches(2, 12345)
    assert not page.matches(3, 12346)
    words = page.words
    assert (words[Word.PID], words[Word.START_TIME], words[Word.WORLD_SIZE]) == (99, 88, 4)
    words[Word.LAYOUT_VERSION] += 1
    assert not page.matches(3, 12345)


DESCRIPTIONS = st.builds(
    CallDescription,
    op=st.text(max_size=30),
    dtype=st.sampled_from(["", "float32"]),
    shape=st.lists(st.integers(0, 2**40), max_size=6).map(tuple),
    root=st.integers(-1, 15),
    send_splits=st.lists(st.integers(0, 2**40), max_size=16).map(tuple),
)


def _describe(page, parity, slot, description):
    page.describe(slot, description.encode())
    page.words[Word.DESCRIBED + parity] = slot


@given(st.lists(DESCRIPTIONS, min_size=3, max_size=3), st.integers(0, 2), st.integers(0, 2))
def test_the_description_of_a_parity_is_that_of_the_slot_it_points_to(written, even, odd):
    page = _page()
    for slot, description in enumerate(written):
        page.describe(slot, description.encode())
    page.words[Word.DESCRIBED], page.words[Word.DESCRIBED + 1] = even, odd
    assert page.description(0) == written[even]
    assert page.description(1) == written[odd]


def test_a_description_that_is_too_long_is_none_and_spills_nowhere():
    page = _page()
    _describe(page, 1, 1, CallDescription("other"))
    long = CallDescription("all_to_all_single", send_splits=tuple(range(10**6, 10**6 + 500)))
    _describe(page, 0, 0, long)
    assert page.description(0) is None
    assert page.description(1) == CallDescription("other")
    page.describe(control.DESCRIPTION_SLOTS - 1, long.encode())
    assert set(page.words[control.ARRIVALS :]) == {0}


def test_a_pointer_that_makes_no_sense_does_not_lead_out_of_the_page():
    page = _page()
    page.words[Word.DESCRIBED] = 2**63 + 1
    assert page.description(0) is None


def test_a_length_that_makes_no_sense_does_not_lead_out_of_the_page():
    page = _page()
    page.words[control.DESCRIPTIONS] = 2**63
    assert page.description(0) is None


def test_the_first_poison_stays():
    page = _page()
    page.poison(PoisonCode.PEER_LOST, 2, 7)
    page.poison(PoisonCode.PEER_TIMEOUT, 3, 8)
    words = page.words
    poison = words[Word.POISON_CODE], words[Word.POISON_RANK], words[Word.POISON_SEQ]
    assert poison == (PoisonCode.PEER_LOST, 2, 7)


@pytest.mark.parametrize("reason", ["it closed the group", "", "x" * 1000, "\u00e9" * 200])
def test_the_first_reason_for_leaving_stays_and_is_cut_to_fit(reason):
    page = _page()
    assert page.leaving_reason is None
    page.leave(reason)
    page.leave("another")
    told = page.leaving_reason
    assert reason.startswith(told.removesuffix("\ufffd"))
    assert len(told.encode()) >= min(len(reason.encode()), 250) - 2
    assert page.description(0) is None


@given(st.integers(0, EPOCH_MASK), st.integers(0, 2**30 + 2))
def test_a_dead_word_is_no_call_of_the_next_quarter_of_a_wrap(epoch, later):
    dead = dead_word(epoch)
    assert dead < 1 << 64
    assert dead & EPOCH_MASK == 0
    assert dead >> 32 != (epoch + later) & EPOCH_MASK


def test_renewal_touches_one_parity_and_all_of_it():
    page = _page()
    page.renew(1, 5)
    renewed = {
        arrival_index(phase, 1, block, source)
        for phase in range(MAX_PHASES)
        for block in range(MAX_BLOCKS)
        for source in range(MAX_WORLD_SIZE)
    }
    for index, word in enumerate(page.words):
        assert word == (dead_word(5) if index in renewed else 0), index


def test_renewal_comes_twice_in_a_quarter_of_a_wrap_and_before_a_dead_word_revives():
    quarter = 2**30
    for start in range(0, 2**32, quarter):
        near = [epoch for epoch in range(start, start + 1000) if not epoch & RENEWAL_MASK]
        assert near == [start, start + 1]
        assert (quarter - 1 + start) & RENEWAL_MASK
    assert quarter + 2 < DEAD_EPOCH

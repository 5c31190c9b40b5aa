import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcomm.memory.control import CONTROL_BYTES, DESCRIPTION_SLOTS, ControlPage
from tcomm.memory.descriptions import OwnDescriptions
from tcomm.signature import CallDescription


@pytest.fixture
def page(monkeypatch):
    page = ControlPage(torch.zeros(CONTROL_BYTES, dtype=torch.uint8))
    page.written = []
    describe = page.describe
    monkeypatch.setattr(page, "describe", lambda *args: (page.written.append(args[0]), describe(*args)))
    return page


def _calls(number):
    return [CallDescription("all_reduce", shape=(size,)) for size in range(number)]


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 1))
def test_both_parities_tell_the_last_call_of_theirs_whatever_came_in_between(kinds, first):
    page = ControlPage(torch.zeros(CONTROL_BYTES, dtype=torch.uint8))
    own, calls, last = OwnDescriptions(page), _calls(6), {}
    for number, kind in enumerate(kinds):
        parity = (first + number) & 1
        own.point(parity, calls[kind])
        last[parity] = calls[kind]
        assert {parity: page.description(parity) for parity in last} == last


@pytest.mark.parametrize("kinds", range(1, DESCRIPTION_SLOTS + 1))
def test_a_few_kinds_in_turn_are_put_down_once(page, kinds):
    own, calls = OwnDescriptions(page), _calls(kinds)
    for number in range(50):
        own.point(number & 1, calls[number % kinds])
        assert page.description(number & 1) == calls[number % kinds]
    assert len(page.written) == len(set(page.written)) == kinds


def test_what_the_peers_may_still_ask_for_is_not_written_over(page):
    own, calls = OwnDescriptions(page), _calls(9)
    for number, call in enumerate(calls):
        own.point(number & 1, call)
        if number:
            assert page.description(1 - (number & 1)) == calls[number - 1]
    assert len(page.written) == len(calls)


def test_a_call_that_takes_the_place_of_a_forgotten_one_is_not_taken_for_it(page):
    own = OwnDescriptions(page)
    for size in range(1000):
        # Each is made where one that was forgotten has just been.
        call = CallDescription("all_reduce", shape=(size,))
        own.point(size & 1, call)
        assert page.description(size & 1) == call
    assert len(page.written) == 1000


def _break_off(monkeypatch, own, page, call):
    """End the next call, of parity 1, in the middle of its description."""
    whole = page.describe

    def broken_off(slot, description):
        whole(slot, description[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "describe", broken_off)
    with pytest.raises(KeyboardInterrupt):
        own.point(1, call)
    monkeypatch.setattr(page, "describe", whole)


def test_a_description_that_was_broken_off_is_put_down_anew(page, monkeypatch):
    own, (first, second) = OwnDescriptions(page), _calls(2)
    own.point(0, first)
    _break_off(monkeypatch, own, page, second)
    own.point(1, second)
    assert page.description(1) == second
    assert page.description(0) == first


def test_what_a_broken_off_description_has_written_over_is_put_down_anew(page, monkeypatch):
    own, calls = OwnDescriptions(page), _calls(4)
    for number in range(3):
        own.point(number & 1, calls[number])
    _break_off(monkeypatch, own, page, calls[3])
    own.point(1, calls[0])
    assert page.description(1) == calls[0]


def test_a_pointer_that_was_broken_off_is_set_anew(page):
    class BreakingOff:
        def __getitem__(self, index):
            return page.words[index]

        def __setitem__(self, index, value):
            page.words[index] = value
            raise KeyboardInterrupt

    own, (first, second) = OwnDescriptions(page), _calls(2)
    own.point(0, first)
    own._words = BreakingOff()
    with pytest.raises(KeyboardInterrupt):
        own.point(0, second)
    own._words = page.words
    own.point(0, first)
    assert page.description(0) == first

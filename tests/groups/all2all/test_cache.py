import gc
import threading

import pytest

from tcomm.errors import UsageError
from tcomm.groups.all2all.cache import Cache


class Made:
    def __init__(self, **kwargs):
        self.kwargs = kwargs


def test_an_object_is_found_by_what_it_was_made_with_whatever_the_order():
    cache = Cache()
    first = cache.get_or_create({"b": 2, "a": 1}, Made)
    assert cache.get_or_create({"a": 1, "b": 2}, Made) is first
    assert first.kwargs == {"a": 1, "b": 2}
    others = [cache.get_or_create(kwargs, Made) for kwargs in ({"a": 2, "b": 1}, {"a": 1}, {})]
    assert len({id(made) for made in (first, *others)}) == 4
    assert {id(made) for made in cache.alive()} == {id(made) for made in (first, *others)}


def test_values_that_cannot_be_compared_are_not():
    cache, group = Cache(), object()
    made = cache.get_or_create({"group": group, "n": None}, Made)
    assert cache.get_or_create({"n": None, "group": group}, Made) is made
    assert cache.get_or_create({"n": None, "group": object()}, Made) is not made


def test_an_object_lives_as_long_as_somebody_keeps_it():
    cache = Cache()
    kept = cache.get_or_create({"a": 1}, Made)
    cache.get_or_create({"a": 2}, Made)
    gc.collect()
    assert cache.alive() == [kept]
    told = id(kept)
    del kept
    gc.collect()
    assert cache.alive() == []
    assert cache.get_or_create({"a": 1}, Made).kwargs == {"a": 1}, told


def test_what_is_forgotten_is_made_anew():
    cache = Cache()
    kept = cache.get_or_create({"a": 1}, Made)
    cache.clear()
    assert cache.alive() == []
    assert cache.get_or_create({"a": 1}, Made) is not kept


def test_two_threads_get_one_object_and_making_may_ask_for_another():
    cache, begun, made = Cache(), threading.Event(), []

    def slow(**kwargs):
        begun.set()
        other.join(0.05)
        return Made(inner=cache.get_or_create({"inner": 1}, Made), **kwargs)

    def second():
        begun.wait(5)
        made.append(cache.get_or_create({"a": 1}, slow))

    other = threading.Thread(target=second)
    other.start()
    first = cache.get_or_create({"a": 1}, slow)
    other.join(5)
    assert made == [first]


def test_what_cannot_be_hashed_is_refused():
    with pytest.raises(UsageError, match="found by what it was made with: unhashable"):
        Cache().get_or_create({"a": []}, Made)

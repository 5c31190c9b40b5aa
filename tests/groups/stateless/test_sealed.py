import gc
import os
import threading
import time

import pytest
import torch.distributed as dist

from tcomm.errors import DecodeError, GroupClosedError, PeerLostError, PeerTimeoutError
from tcomm.groups.stateless.sealed import CallThread, SealedStore

SECRETS = pytest.mark.parametrize("secret", [None, b"told to nobody"])


@SECRETS
def test_what_was_put_down_is_found(secret):
    raw = dist.HashStore()
    store, other = SealedStore(raw, secret), SealedStore(raw, secret)
    store.set("a", b"\x00\xff")
    assert other.get("a") == b"\x00\xff"
    assert (other.check(["a"]), other.check(["a", "b"])) == (True, False)
    assert (store.add("n", 2), other.add("n", 3)) == (2, 5)
    assert (store.delete_key("a"), store.delete_key("a"), store.check(["a"])) == (True, False, False)


@SECRETS
def test_the_first_proposal_counts_for_all(secret):
    raw = dist.HashStore()
    first, second = SealedStore(raw, secret), SealedStore(raw, secret)
    assert first.decide("v", b"\xff1") == b"\xff1"
    assert second.decide("v", b"2") == b"\xff1"
    assert second.get("v") == b"\xff1"


@SECRETS
def test_a_part_has_keys_of_its_own(secret):
    store = SealedStore(dist.HashStore(), secret, where="here")
    part = store.below("p")
    part.set("a", b"1")
    assert (store.check(["a"]), store.check(["p/a"]), part.where) == (False, True, "here")
    assert store.below("p").get("a") == b"1"


def test_values_of_strangers_are_refused():
    raw = dist.HashStore()
    ours, other, plain = SealedStore(raw, b"ours"), SealedStore(raw, b"other"), SealedStore(raw)
    cases = {
        "another secret": other.set,
        "no secret": plain.set,
        "raw": raw.set,
        "text": lambda key, value: raw.set(key, b"t!!!"),
    }
    for name, put in cases.items():
        put(name, b"value")
        with pytest.raises(DecodeError, match=name):
            ours.get(name)
    ours.set("signed", b"value")
    with pytest.raises(DecodeError, match="signed with a secret that this process does not have"):
        plain.get("signed")
    with pytest.raises(DecodeError, match="not what this group writes"):
        plain.get("raw")


def test_a_value_means_nothing_at_another_key_or_in_another_group():
    raw = dist.HashStore()
    ours = SealedStore(raw, b"ours")
    ours.set("a", b"value")
    raw.set("b", raw.get("a"))
    with pytest.raises(DecodeError, match="'b' in the store was not written by a process with"):
        ours.get("b")
    raw.set("p/a", raw.get("a"))
    with pytest.raises(DecodeError, match="'a' in the store"):
        ours.below("p").get("a")


def test_calls_are_made_by_one_thread_which_ends_with_its_owner():
    thread = CallThread()
    names = {thread.call(5.0, lambda: threading.current_thread().name) for _ in range(3)}
    assert names == {"tcomm-store"}
    with pytest.raises(KeyError):
        thread.call(5.0, {}.__getitem__, "a")
    running = threading.active_count()
    del thread
    gc.collect()  # the error that was caught has a traceback
    deadline = time.monotonic() + 5
    while threading.active_count() >= running:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_call_that_does_not_end_is_left_behind_and_what_follows_is_not_begun():
    thread, stuck, made = CallThread(), threading.Event(), []
    for call in (stuck.wait, lambda: made.append(1)):
        with pytest.raises(TimeoutError):
            thread.call(0.05, call)
    stuck.set()
    assert thread.call(5.0, list) == []
    assert made == []


class _Failing:
    def __init__(self, call):
        self.check = call


def test_a_store_that_is_silent_or_gone_is_told_as_rank_0():
    stuck = threading.Event()
    store = SealedStore(
        _Failing(lambda keys: stuck.wait()), where="the store", thread=CallThread(), seconds=60
    )
    store.allow(0.1)
    started = time.monotonic()
    with pytest.raises(PeerTimeoutError, match="rank 0 does not answer: the store is silent") as caught:
        store.check(["a"])
    assert (caught.value.peers, time.monotonic() - started < 2) == ((0,), True)
    stuck.set()

    def fail(keys):
        raise dist.DistNetworkError("closed\nat frame #0")

    with pytest.raises(PeerLostError, match=r"rank 0 is gone, and the store with it: closed$") as caught:
        SealedStore(_Failing(fail)).check(["a"])
    assert caught.value.peers == (0,)


def test_a_call_may_take_as_long_as_is_allowed():
    store = SealedStore(_Failing(lambda keys: not time.sleep(0.8)), thread=CallThread(), seconds=0.1)
    store.allow(20.0)
    assert store.check(["a"]) is True


def test_a_child_of_a_fork_is_refused(monkeypatch):
    store = SealedStore(dist.HashStore())
    child = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: child)
    with pytest.raises(GroupClosedError, match=f"belongs to process {child - 1}, not to its child {child}"):
        store.check(["a"])

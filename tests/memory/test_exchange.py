import concurrent.futures
import time

import pytest
import torch.distributed as dist

from tcomm.errors import RendezvousError
from tcomm.memory.exchange import LocalExchange, StoreExchange


def test_a_world_of_one_hands_its_payload_back():
    assert LocalExchange().all_gather(b"x", 1.0) == [b"x"]


def _rounds(member):
    exchange = member.exchange("rounds")
    gathered = []
    for round_ in range(5):
        if round_ % member.world_size == member.rank:
            time.sleep(0.02)
        gathered.append(exchange.all_gather(bytes([round_, member.rank]), 10.0))
    return gathered


def test_every_round_gives_every_payload_in_rank_order(on_ranks):
    expected = [[bytes([round_, rank]) for rank in range(3)] for round_ in range(5)]
    assert on_ranks(3, _rounds) == [expected] * 3


class _Store:
    """A store of any sort, and how often it was asked for a value."""

    def __init__(self, store):
        self.set, self.check, self.delete_key = store.set, store.check, store.delete_key
        self.requests, self._store = 0, store

    def get(self, key):
        self.requests += 1
        return self._store.get(key)


class _StoreOfMany(_Store):
    def has_extended_api(self):
        return True

    def multi_get(self, keys):
        self.requests += 1
        return self._store.multi_get(keys)


@pytest.mark.parametrize(("kind", "requests"), [(_Store, 5), (_StoreOfMany, 1)])
def test_values_come_in_one_request_where_the_store_can_do_that(kind, requests):
    store = kind(dist.HashStore())
    for rank in range(1, 5):
        store.set(f"g/0/{rank}", b"+" + bytes([rank]))
    assert StoreExchange(store, 0, 5, "g").all_gather(b"0", 1.0) == [b"0", *(bytes([r]) for r in range(1, 5))]
    assert store.requests == requests


def test_a_store_in_a_file_will_do(tmp_path):
    stores = [dist.FileStore(str(tmp_path / "store"), 2) for _ in range(2)]
    ranks = [StoreExchange(store, rank, 2, "g") for rank, store in enumerate(stores)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(ranks[1].all_gather, b"b", 10.0)
        assert ranks[0].all_gather(b"a", 10.0) == other.result() == [b"a", b"b"]


def _payloads(member):
    payload = {0: b"", 1: bytes(range(256)) * 16}[member.rank]
    return member.exchange("payloads").all_gather(payload, 10.0)


def test_payloads_may_be_empty_and_hold_any_byte(on_ranks):
    assert on_ranks(2, _payloads) == [[b"", bytes(range(256)) * 16]] * 2


def test_a_timeout_names_the_missing_ranks():
    store = dist.HashStore()
    store.set("tcomm/tp/1/0/2", b"here")
    started = time.monotonic()
    with pytest.raises(RendezvousError) as caught:
        StoreExchange(store, 0, 4, "tcomm/tp/1").all_gather(b"", 0.3)
    assert 0.25 < time.monotonic() - started < 5
    assert str(caught.value) == (
        "ranks [1, 3] of 4 did not come to 'tcomm/tp/1' within 0.3 s; check that they are running and call "
        "the same things in the same order, or give a longer timeout"
    )


def test_who_gave_up_came_and_does_not_count_when_the_last_comes():
    store = dist.HashStore()
    early, late = (StoreExchange(store, rank, 2, "g") for rank in range(2))
    with pytest.raises(RendezvousError, match=r"ranks \[1\] of 2 did not come"):
        early.all_gather(b"first", 0.1)
    with pytest.raises(RendezvousError, match="all 2 ranks came to 'g', and some gave up before the last"):
        late.all_gather(b"x", 0.1)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        again = pool.submit(early.all_gather, b"second", 10.0)
        assert late.all_gather(b"x", 10.0) == again.result() == [b"second", b"x"]


class _InterruptedError(Exception):
    pass


def test_a_check_may_end_the_wait():
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise _InterruptedError

    with pytest.raises(_InterruptedError):
        StoreExchange(dist.HashStore(), 0, 2, "tp").all_gather(b"", 30.0, check)


def test_a_long_lived_group_leaves_few_keys_behind():
    store = dist.HashStore()
    exchanges = [StoreExchange(store, rank, 1, "tp") for rank in (0,)]
    for _ in range(20):
        exchanges[0].all_gather(b"", 1.0)
    assert store.num_keys() <= 3


def test_a_store_that_is_gone_is_a_failed_rendezvous():
    class Gone:
        def set(self, key, value):
            raise dist.DistNetworkError("connection reset")

    with pytest.raises(RendezvousError) as caught:
        StoreExchange(Gone(), 0, 2, "tp").all_gather(b"", 1.0)
    assert str(caught.value) == "the store of group 'tp' failed: connection reset"


def test_groups_on_one_store_do_not_read_each_others_keys():
    store = dist.HashStore()
    first = StoreExchange(store, 0, 1, "a").all_gather(b"1", 1.0)
    second = StoreExchange(store, 0, 1, "b").all_gather(b"2", 1.0)
    assert (first, second) == ([b"1"], [b"2"])

import threading

import pytest
import torch.distributed as dist

from tcomm.errors import PeerLostError, PeerTimeoutError
from tcomm.groups.stateless.barrier import Barrier
from tcomm.groups.stateless.sealed import SealedStore


def _no_epitaph(rank):
    return ""


def _run(store, ranks, world_size=3, number=0, timeout=10.0, epitaph=_no_epitaph):
    """What came of a barrier on some ranks, each a thread."""
    told = {}

    def run(rank):
        try:
            Barrier(SealedStore(store), rank, world_size, number, timeout, epitaph).run()
            told[rank] = None
        except Exception as error:
            told[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_all_pass_and_nothing_is_left():
    store = dist.HashStore()
    for number in range(5):
        assert _run(store, [0, 1, 2], number=number) == dict.fromkeys(range(3))
    assert store.num_keys() == 0


def test_all_raise_when_one_does_not_come_and_so_does_it_when_it_comes():
    store = dist.HashStore()
    told = _run(store, [0, 2], timeout=0.2)
    late = _run(store, [1], timeout=10.0)
    texts = {str(error) for error in [*told.values(), *late.values()]}
    assert len(texts) == 1
    assert texts.pop().startswith("Barrier timed out after 0.20 seconds on rank ")
    assert all(type(error) is PeerTimeoutError and isinstance(error, RuntimeError) for error in told.values())
    assert "ranks [1] had not come" in str(told[0])
    assert told[0].peers == (1,)


def test_a_dead_rank_ends_it_at_once():
    told = _run(dist.HashStore(), [0, 2], timeout=30.0, epitaph=lambda rank: "killed" if rank == 1 else "")
    assert [str(error) for error in told.values()] == ["Barrier failed: rank 1 ended (killed)"] * 2
    assert {type(error) for error in told.values()} == {PeerLostError}


class _Choosy(SealedStore):
    """A store that loses some keys."""

    def __init__(self, lost):
        super().__init__(dist.HashStore())
        self.lost = lost

    def set(self, key, value):
        if self.lost in key:
            raise PeerLostError("no store", peers=(0,))
        super().set(key, value)


@pytest.mark.parametrize("what", ["arrival", "departure"])
def test_a_signal_that_cannot_be_given_is_told(what):
    with pytest.raises(PeerLostError, match=f"Failed to signal barrier {what}: no store") as caught:
        Barrier(_Choosy(what), 0, 1, 0, 1.0, _no_epitaph).run()
    assert caught.value.peers == (0,)


def test_rank_0_says_who_did_not_leave():
    store = dist.HashStore()
    sealed = SealedStore(store)
    sealed.set("barrier/0/arrival/1", b"")
    with pytest.raises(PeerTimeoutError) as caught:
        Barrier(sealed, 0, 2, 0, 0.1, _no_epitaph).run()
    assert str(caught.value) == (
        "Barrier departure timed out after 0.10 seconds; ranks [1] came and did not leave"
    )

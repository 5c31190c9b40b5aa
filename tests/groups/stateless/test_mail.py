import pytest
import torch.distributed as dist

from tcomm.errors import DecodeError
from tcomm.groups.stateless import mail
from tcomm.groups.stateless.mail import put_message, remove_message, take_message
from tcomm.groups.stateless.sealed import SealedStore


@pytest.fixture(params=[None, b"secret"])
def store(request, monkeypatch):
    monkeypatch.setattr(mail, "PIECE_NBYTES", 10)
    return SealedStore(dist.HashStore(), request.param)


@pytest.mark.parametrize("nbytes", [0, 1, 9, 10, 11, 20, 35])
@pytest.mark.parametrize("num_readers", [1, 3])
def test_a_message_is_read_by_all_and_leaves_nothing(store, nbytes, num_readers):
    message = bytes(range(nbytes))
    put_message(store, "m", message)
    for _ in range(num_readers):
        assert store.store.num_keys() > 0
        assert take_message(store, "m", num_readers) == message
    assert store.store.num_keys() == 0


def test_values_stay_small(store):
    put_message(store, "m", bytes(95))
    sizes = [len(store.get(key)) for key in ("m", *(f"m/{n}" for n in range(1, 10)))]
    assert max(sizes) <= 14
    assert not store.check(["m/10"])


def test_an_unread_message_can_be_removed(store):
    put_message(store, "m", bytes(35))
    remove_message(store, "m")
    assert store.store.num_keys() == 0
    remove_message(store, "m")


@pytest.mark.parametrize("first", [b"", b"\x00\x00\x00\x00", b"\xff\xff\xff\xff"])
def test_what_is_no_message_costs_one_error(store, first):
    store.set("m", first)
    with pytest.raises(DecodeError, match="does not begin with a number of pieces"):
        take_message(store, "m", 1)
    assert store.store.num_keys() == 0


def test_a_message_with_a_piece_missing_is_not_waited_for(store):
    put_message(store, "m", bytes(35))
    store.delete_key("m/2")
    with pytest.raises(DecodeError, match="pieces of the message 'm' are missing"):
        take_message(store, "m", 1)
    assert store.store.num_keys() == 0

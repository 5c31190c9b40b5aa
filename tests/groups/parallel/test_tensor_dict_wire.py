import types

import pytest
import torch

from tcomm.errors import DecodeError, UsageError
from tcomm.groups.parallel.tensor_dict_wire import Slicing, check_dict, pack, unpack
from tcomm.objects.codec import decode, encode

GROUP = types.SimpleNamespace(
    world_size=2, rank_in_group=1, unique_name="tp:0", all_gather=lambda x, dim: x.repeat(2)
)


def test_a_dict_is_one_message_with_what_is_in_host_memory():
    x = torch.arange(6).reshape(2, 3)
    packed = pack({"x": x, "n": 3}, Slicing())
    assert packed.message == [("x", "tensor", x), ("n", "value", 3)]
    assert packed.on_devices == []
    received, finish = unpack(decode(encode(packed.message).join()), Slicing(), None)
    assert list(received) == ["x", "n"]
    assert torch.equal(received["x"], x)
    assert finish == []


def test_what_is_on_a_device_follows_by_itself():
    packed = pack({"x": torch.ones(2, 2, device="meta"), "e": torch.ones(0, device="meta")}, Slicing())
    assert [x.shape for x in packed.on_devices] == [(2, 2)]
    asked = []
    received, _ = unpack(packed.message, Slicing(), asked.append)
    assert [x.shape for x in asked] == [(2, 2)]
    assert received["e"].shape == (0,)
    assert received["x"].is_meta


@pytest.mark.parametrize(("chosen", "sent"), [(None, [3]), ({"x": False}, [6]), ({"x": True}, [3])])
def test_a_slice_travels_where_it_divides_or_is_asked_for(chosen, sent):
    slicing = Slicing(GROUP, chosen)
    packed = pack({"x": torch.arange(6)}, slicing)
    travels = packed.message[0][2]
    assert list(travels.shape if sent == [6] else travels[0].shape) == sent
    assert list(slicing.sent_size("x", torch.Size([6]))) == sent
    received, finish = unpack(packed.message, slicing, None)
    for step in finish:
        step()
    assert received["x"].tolist() == ([3, 4, 5] * 2 if sent == [3] else list(range(6)))


def test_slices_of_what_does_not_divide():
    assert Slicing(GROUP).applies("x", 3) is False
    assert Slicing(GROUP, {"x": True}).applies("x", 0) is False
    assert Slicing().applies("x", 4) is False
    assert Slicing().cut("x", x := torch.ones(3)) is x
    with pytest.raises(UsageError, match="'x', whose 3 elements"):
        pack({"x": torch.ones(3)}, Slicing(GROUP, {"x": True}))
    assert check_dict(given := {}) is given
    with pytest.raises(UsageError, match="Expecting a dictionary"):
        pack([], Slicing())


@pytest.mark.parametrize(("sender", "receiver"), [(GROUP, None), (None, GROUP)])
def test_ends_that_slice_in_different_ways(sender, receiver):
    packed = pack({"x": torch.arange(6)}, Slicing(sender))
    kinds = ("slice", "tensor") if sender else ("tensor", "slice")
    with pytest.raises(UsageError, match=r"'x' was sent as a {} and is expected as a {}".format(*kinds)):
        unpack(packed.message, Slicing(receiver), None)


@pytest.mark.parametrize(
    "message",
    [
        1,
        (1, 2),
        [("x", "tensor", 3)],
        [("x", "slice", (torch.ones(1), 3))],
        [("x", "tensor")],
        [(["x"], "value", 3)],
    ],
)
def test_a_message_that_is_no_dict(message):
    with pytest.raises(DecodeError, match="no dict with tensors"):
        unpack(message, Slicing(), None)

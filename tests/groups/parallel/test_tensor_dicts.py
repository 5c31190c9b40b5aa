import collections

import pytest
import torch

from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.objects.codec import decode
from tests.groups.parallel.engine import coordinator, engine, numbers, refusal


def _contents():
    return {
        "a": torch.arange(8, dtype=torch.int8),
        "b": torch.ones(1, dtype=torch.float16),
        "c": "test",
        "d": [1, 2, 3],
        "e": {"a": 1, "b": 2},
        "f": torch.empty(0),
        "g": numbers(3, 4).t(),
        "h": [torch.tensor(2.5)],
    }


def _check(got):
    want = _contents()
    assert list(got) == list(want)
    for key in "abfg":
        assert torch.equal(got[key], want[key]), key
        assert got[key].dtype is want[key].dtype
    assert [got[key] for key in "cde"] == [want[key] for key in "cde"]
    assert got["h"][0].item() == 2.5


def _broadcast(member, with_queue):
    with coordinator(member, with_queue=with_queue) as group:
        for src in (0, 1):
            given = _contents() if member.rank == src else None
            got = group.broadcast_tensor_dict(given, src)
            assert got is given if member.rank == src else _check(got) is None
        if member.rank == 0:
            assert refusal(group.broadcast_tensor_dict, [1]) == (
                "UsageError",
                "Expecting a dictionary, got <class 'list'>",
            )
        assert refusal(group.broadcast_tensor_dict, {}, 7)[1].startswith("Invalid src rank (7)")


@pytest.mark.parametrize("with_queue", [True, False])
def test_broadcast_from_any_source(on_ranks, with_queue):
    on_ranks(2, _broadcast, with_queue)


def _round(member):
    """A ring, in which everybody sends before it receives."""
    with coordinator(member) as group:
        contents = _contents() | {"from": member.rank, "large": numbers(300, 300, offset=member.rank)}
        handles = group.isend_tensor_dict(contents)
        contents["large"].zero_()
        got = group.recv_tensor_dict()
        before = (member.rank - 1) % member.world_size
        assert got.pop("from") == before
        assert torch.equal(got.pop("large"), numbers(300, 300, offset=before))
        _check(got)
        got["a"].add_(1)
        for handle in handles:
            handle.wait()
        assert group.isend_tensor_dict({"again": 1}) != []
        received, waits, finish = group.irecv_tensor_dict()
        assert (received, waits, finish) == ({"again": 1}, [], [])
        assert len(group._pending_isends) == 1, "what was sent is let go"
        if member.rank == 0:
            assert group.send_tensor_dict({"x": torch.ones(2)}, 1) is None
        if member.rank == 1:
            assert group.recv_tensor_dict(0)["x"].tolist() == [1.0, 1.0]
        assert refusal(group.send_tensor_dict, {}, 9)[1].startswith("Invalid dst rank (9)")
        assert refusal(group.recv_tensor_dict, 9)[1].startswith("Invalid src rank (9)")
        _check_refusals(group)


def _check_refusals(group):
    """What is refused in a group of any size."""
    for call in (group.send_tensor_dict, group.isend_tensor_dict):
        assert refusal(call, "x")[1] == "Expecting a dictionary, got <class 'str'>"
        assert refusal(call, {}, 7)[1].startswith("Invalid dst rank (7)")
        assert "is no group" in refusal(call, {}, None, 1)[1]
        assert "is no dict" in refusal(call, {}, None, group, 1)[1]
    for call in (group.recv_tensor_dict, group.irecv_tensor_dict):
        assert refusal(call, 7)[1].startswith("Invalid src rank (7)")
        assert "is no group" in refusal(call, None, "x")[1]
        assert "is no dict" in refusal(call, None, group, ["x"])[1]


def test_a_ring_of_dicts(on_ranks):
    on_ranks(3, _round)


def _slices(member):
    with engine(member, tp=2, pp=2) as groups:
        pp, tp = groups.get_pp_group(), groups.get_tp_group()
        contents = {
            "even": numbers(4, 3),
            "odd": numbers(3),
            "whole": numbers(2),
            "none": torch.empty(0),
            "n": 1,
        }
        choice = {"whole": False}
        if pp.is_first_rank:
            pp.send_tensor_dict(contents, all_gather_group=tp, all_gather_tensors=choice)
            told = refusal(pp.send_tensor_dict, contents, None, tp, {"odd": True})
            assert told[0] == "UsageError"
            assert "'odd', whose 3 elements do not divide by the 2 ranks" in told[1]
            return None
        got, handles, finish = pp.irecv_tensor_dict(all_gather_group=tp, all_gather_tensors=choice)
        assert handles == []
        assert len(finish) == 1
        assert torch.equal(got["even"], numbers(12)[6 * tp.rank_in_group :][:6]), "half of it has travelled"
        finish[0]()
        return [got[key].tolist() for key in ("even", "odd", "whole", "none")]


def test_slices_are_gathered_where_they_arrive(on_ranks):
    received = on_ranks(4, _slices)
    want = [numbers(4, 3).tolist(), [0.0, 1.0, 2.0], [0.0, 1.0], []]
    assert received == [None, None, want, want]


def _alone(member):
    with coordinator(member) as group:
        contents = {"x": torch.ones(1)}
        assert group.broadcast_tensor_dict(contents) is contents
        assert group.broadcast_tensor_dict() is None
        assert group.send_tensor_dict(contents) is contents
        assert group.isend_tensor_dict(contents) == []
        assert group.recv_tensor_dict() is None
        assert group.irecv_tensor_dict() == (None, [], [])
        _check_refusals(group)
        assert refusal(group.broadcast_tensor_dict, 5)[1] == "Expecting a dictionary, got <class 'int'>"
        group.destroy()
        for call in (group.send_tensor_dict, group.isend_tensor_dict, group.broadcast_tensor_dict):
            assert refusal(call, contents)[1] == f"Group {group.unique_name} is destroyed."
        for call in (group.recv_tensor_dict, group.irecv_tensor_dict):
            assert refusal(call)[1] == f"Group {group.unique_name} is destroyed."


def test_a_group_of_one_keeps_its_dict(on_ranks):
    on_ranks(1, _alone)


def _gradients(member):
    with coordinator(member) as group:
        if member.rank == 0:
            kind, text = refusal(group.broadcast_tensor_dict, {"w": torch.ones(2, requires_grad=True)})
            assert kind == "ConfigError"
            assert "detach" in text
        assert group.broadcast_object("after" if member.rank == 0 else None) == "after"


def test_a_gradient_is_not_lost_in_silence(on_ranks):
    on_ranks(2, _gradients)


class _Wire:
    """Both ends of a lane and a device: what was asked of it."""

    algorithm = "torch"

    def __init__(self):
        self.calls = []
        self.communicator = self

    def send(self, x, dst, **how):
        kind = "tensor" if isinstance(x, torch.Tensor) else "message"
        self.message = self.message if kind == "tensor" else decode(x.join())
        self.calls.append((kind, dst, how))
        return "work"

    isend = send

    def recv(self, *args, **how):
        self.calls.append((args[-1], how))
        return self.message if len(args) == 1 else "work"


def _wired():
    group = GroupCoordinator.__new__(GroupCoordinator)
    group.world_size, group.rank_in_group, group.unique_name = 2, 0, "tp:0"
    group.lanes = group.device_communicator = wire = _Wire()
    group._pending_isends = collections.deque()
    return group, wire


def test_what_is_on_a_device_follows_the_message_without_a_detour():
    group, wire = _wired()
    contents = {"x": torch.ones(3, device="meta"), "n": 1}
    assert group.send_tensor_dict(contents) is None
    assert wire.calls == [("message", 1, {}), ("tensor", 1, {})], "the caller's thread sends"
    wire.calls.clear()
    assert group.recv_tensor_dict()["x"].shape == (3,)
    assert wire.calls == [(1, {}), (1, {"algorithm": "torch"})]
    wire.calls.clear()
    group.isend_tensor_dict(contents)
    _, handles, _ = group.irecv_tensor_dict()
    behind = {"async_op": True, "algorithm": "torch"}
    assert wire.calls == [("message", 1, {}), ("tensor", 1, behind), (1, {}), (1, behind)]
    assert handles == ["work"]

import gc
import threading

import numpy as np
import pytest
import torch

from tests.groups.parallel.engine import coordinator, refusal

OBJECTS = [None, True, 3, "x", b"y", [1, (2, 3)], {"a": {1, 2}}, np.arange(5), torch.arange(7), "long" * 5000]


def _same(got, want):
    if isinstance(want, np.ndarray):
        return type(got) is np.ndarray and np.array_equal(got, want)
    if isinstance(want, torch.Tensor):
        return torch.equal(got, want)
    return type(got) is type(want) and got == want


def _broadcast(member, with_queue):
    with coordinator(member, with_queue=with_queue, with_device=with_queue) as group:
        assert (group.mq_broadcaster is not None) is with_queue
        for src in range(member.world_size):
            for obj in OBJECTS:
                mine = obj if member.rank == src else "ignored"
                got = group.broadcast_object(mine, src)
                assert got is mine if member.rank == src else _same(got, obj)
        for src in (-1, member.world_size):
            assert refusal(group.broadcast_object, 1, src)[1].startswith(f"Invalid src rank ({src})")
        objects = [{"rank": 1}, "b"] if member.rank == 1 else [0, 0]
        assert group.broadcast_object_list(objects, 1) is objects
        assert objects == [{"rank": 1}, "b"]
        if member.rank == 0:
            kind, text = refusal(group.broadcast_object, {"a": [1, object()]})
            assert kind == "ConfigError"
            assert "['a'][1]" in text
        assert group.broadcast_object("after" if member.rank == 0 else None) == "after"


@pytest.mark.parametrize("with_queue", [True, False])
def test_any_source_gives_any_object(on_ranks, with_queue):
    on_ranks(4 if with_queue else 2, _broadcast, with_queue)


def _lists_of_another_length(member):
    with coordinator(member) as group:
        kind, text = refusal(group.broadcast_object_list, [0] * (2 + member.rank))
        stranger = object()
        for wrong in (1, "x", (1, 2), None):
            assert refusal(group.broadcast_object_list, wrong) == (
                "UsageError",
                f"broadcast_object_list takes a list, not {type(wrong).__name__}",
            )
        assert group.broadcast_object(member.rank, 1) == 1, "nothing of this was sent"
        if member.rank == 0:
            group.broadcast_object(5)
        else:
            assert refusal(group.broadcast_object_list, [1])[1].startswith("rank 0 broadcast a int")
        return kind, text, refusal(group.broadcast_object_list, [0], 0, stranger)[0]


def test_a_list_of_another_length_is_told(on_ranks):
    fine, told = on_ranks(2, _lists_of_another_length)
    assert fine == ("nothing", "", "UsageError")
    assert told[:2] == ("UsageError", "a list of 3 objects here, of 2 on rank 0")


def _pairs(member):
    """Everybody sends to everybody before anybody receives."""
    with coordinator(member) as group:
        me, size = member.rank, member.world_size
        others = [rank for rank in range(size) if rank != me]
        handles = [group.isend_object({"from": me, "data": torch.full((50_000,), me)}, dst) for dst in others]
        for src in reversed(others):
            got = group.recv_object(src)
            assert got["from"] == src
            assert torch.equal(got["data"], torch.full((50_000,), src))
        for handle in handles:
            handle.wait()
            handle.wait()
            assert handle.is_completed()
        if me == 0:
            group.send_object("first", 1)
            group.send_object("second", 1)
        if me == 1:
            assert [group.recv_object(0), group.recv_object(0)] == ["first", "second"]
        told = (
            refusal(group.send_object, 1, me),
            refusal(group.recv_object, me),
            refusal(group.send_object, 1, size),
        )
        return [text for _, text in told]


def test_messages_of_all_pairs_at_once(on_ranks):
    for rank, told in enumerate(on_ranks(3, _pairs)):
        assert told[0] == "Invalid destination rank. Destination rank is the same as the current rank."
        assert told[1] == "Invalid source rank. Source rank is the same as the current rank."
        assert told[2].startswith("Invalid dst rank (3)"), rank


def _queues(member):
    with coordinator(member) as group:
        queue = group.create_mq_broadcaster(1)
        got = queue.broadcast_object("hello" if member.rank == 1 else None)
        mine, handles = group.create_single_reader_mq_broadcasters(0)
        queue.shutdown()
        mine.shutdown()
        return got, len(handles)


def test_queues_of_its_own(on_ranks):
    assert on_ranks(2, _queues) == [("hello", 2), ("hello", 0)]


def test_a_group_of_one_keeps_its_object(on_ranks):
    on_ranks(1, _alone)


def _alone(member):
    with coordinator(member, with_queue=True) as group:
        thing = object()
        assert group.broadcast_object(thing) is thing
        assert group.broadcast_object_list([thing]) == [thing]
        assert refusal(group.broadcast_object_list, (1, 2))[0] == "UsageError"
        assert group.mq_broadcaster is None
        assert refusal(group.send_object, 1, 0)[0] == "UsageError"
        assert "has one rank" in refusal(group._lanes)[1]
        del group
        gc.collect()
        assert threading.active_count() < 20


def _destroyed(member):
    with coordinator(member, with_queue=True) as group:
        group.destroy()
        calls = [
            (group.broadcast_object, 1),
            (group.broadcast_object_list, [1]),
            (group.send_object, 1, 1 - member.rank),
            (group.isend_object, 1, 1 - member.rank),
            (group.recv_object, 1 - member.rank),
            (group.create_mq_broadcaster,),
            (group.create_single_reader_mq_broadcasters,),
            (group._lanes,),
        ]
        return {refusal(call, *args) for call, *args in calls}, group.unique_name, group._queues


def test_a_destroyed_group_says_so(on_ranks):
    for said, name, queues in on_ranks(2, _destroyed):
        assert said == {("ConfigError", f"Group {name} is destroyed.")}
        assert not queues


def _default_device(member):
    with coordinator(member) as group:
        group.broadcast_object()
        with torch.device("meta"):
            group.send_object([1, "x" * 2000], 1) if member.rank == 0 else None
            received = group.recv_object(0) if member.rank else None
            return received, group.broadcast_object("all" if member.rank == 0 else None)


def test_the_default_device_is_no_matter(on_ranks):
    assert on_ranks(2, _default_device) == [(None, "all"), ([1, "x" * 2000], "all")]

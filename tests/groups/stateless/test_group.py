import dataclasses
import os
import signal
import socket
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tcomm
from tcomm.errors import (
    CollectiveMismatchError,
    ConfigError,
    DecodeError,
    GroupClosedError,
    PeerLostError,
    PeerTimeoutError,
)
from tcomm.groups.stateless.group import StatelessProcessGroup


def made(member, name="test", **options):
    """A stateless group of all ranks, at a port that rank 0 found free."""
    return StatelessProcessGroup.create(
        "127.0.0.1",
        0,
        member.rank,
        member.world_size,
        store_timeout=20,
        group_name=name,
        via=member.store,
        **options,
    )


def _keys(group):
    return group.opened.point.store.num_keys()


def _objects(group):
    rank = group.rank
    mine = {"rank": rank, "array": np.arange(rank + 1), "nested": [(1, None), {2.5}]}
    gathered = group.all_gather_obj(mine)
    assert gathered[rank] is mine
    assert [sorted(g) for g in gathered] == [["array", "nested", "rank"]] * 3
    assert [g["array"].tolist() for g in gathered] == [list(range(r + 1)) for r in range(3)]
    # Two senders, one receiver, and the other order.
    if rank < 2:
        for number in range(3):
            group.send_obj((rank, number), 2)
    else:
        assert [group.recv_obj(src) for src in (1, 0, 1, 0, 0, 1)] == [
            (1, 0), (0, 0), (1, 1), (0, 1), (0, 2), (1, 2),
        ]  # fmt: skip
    group.send_obj("myself", rank)
    assert group.recv_obj(rank) == "myself"
    value = bytes(range(256)) * 12000
    assert group.broadcast_obj(value if rank == 1 else None, 1) == value
    assert group.broadcast_obj(value, 0) == value


def _mistakes(group):
    for call in (
        lambda: group.send_obj(1, 3), lambda: group.recv_obj(-1), lambda: group.broadcast_obj(1, 7),
        lambda: group.send_obj([{"a": object()}], 0), lambda: group.broadcast(3, group.rank),
        lambda: group.all_reduce(torch.ones(1), dist.ReduceOp.BAND), lambda: group.barrier(timeout=0),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(ConfigError, match=r"\[0\]\['a'\]"):
        group.send_obj([{"a": object()}], 0)


def _tensors(group):
    rank = group.rank
    x = torch.full((2, 3), float(rank))
    told = group.broadcast(x, 1)
    assert (told is x) == (rank == 1)
    assert torch.equal(told, torch.ones(2, 3))
    assert torch.equal(x, torch.full((2, 3), float(rank)))
    if rank == 0:
        group.send(torch.arange(6.0).view(3, 2).t(), 2)
        group.send(torch.ones(4), 2)
        group.send_obj("no tensor", 2)
    elif rank == 2:
        into = torch.zeros(2, 3)
        assert group.recv(into, 0) is into
        assert into.tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
        with pytest.raises(
            CollectiveMismatchError, match=r"rank 0 sent torch\.float32 \[4\]; the tensor given"
        ):
            group.recv(into, 0)
        with pytest.raises(CollectiveMismatchError, match="rank 0 sent a str and no tensor"):
            group.recv(into, 0)
    y = torch.tensor([rank + 1, 5 - rank])
    ops = {"SUM": [6, 12], "PRODUCT": [6, 60], "MAX": [3, 5], "MIN": [1, 3]}
    for op, expected in ops.items():
        assert group.all_reduce(y, getattr(dist.ReduceOp, op)).tolist() == expected
    assert y.tolist() == [rank + 1, 5 - rank]
    with pytest.raises(CollectiveMismatchError, match=r"rank 1: torch\.float32 \[2\]"):
        group.all_reduce(torch.ones(1 + (rank == 1)))


def _everything(member):
    group = made(member)
    assert not dist.is_initialized()
    group.barrier()
    before = _keys(group)
    group.barrier()
    for _ in range(12):
        _objects(group)
    _mistakes(group)
    _tensors(group)
    group.barrier()
    if member.rank == 0:
        # Nobody wrote since, but to arrive here; what was read is gone.
        assert _keys(group) <= before + member.world_size + 1
        assert len(group.entries) < 100
    group.barrier()
    with tcomm.Communicator.from_store(group.store, group.rank, 3, name="on it", timeout=20.0) as comm:
        assert comm.all_reduce(torch.ones(2)).tolist() == [3.0, 3.0]
    group.barrier()
    second = made(member, "second")
    second.barrier()
    group.close()
    group.close()
    with pytest.raises(GroupClosedError, match="group 'test' is closed"):
        group.send_obj(1, 0)
    assert second.all_gather_obj(member.rank) == [0, 1, 2]
    second.barrier()
    return "done"


def test_objects_tensors_and_barriers(on_ranks):
    assert on_ranks(3, _everything) == ["done"] * 3


def _bad_message(member):
    group = made(member)
    if member.rank == 0:
        group.send_obj("first", 1)
        group._sealed.set("send_to/0/1/1", (1).to_bytes(4, "little") + b"\xc1no object")
        group.send_dst_counter[1] += 1
        group._sealed.store.set("send_to/0/1/2", b"garbage of a stranger")
        group.send_dst_counter[1] += 1
        group.send_obj("last", 1)
    else:
        told = [group.recv_obj(0)]
        for _ in range(2):
            with pytest.raises(DecodeError) as caught:
                group.recv_obj(0)
            assert (caught.value.op, caught.value.group, caught.value.rank) == ("recv_obj", "test", 1)
        told.append(group.recv_obj(0))
        assert told == ["first", "last"]
    group.barrier()
    return "done"


@pytest.mark.parametrize("secret", ["", "told to nobody else"])
def test_a_bad_message_costs_one_error_and_nothing_after_it(on_ranks, monkeypatch, secret):
    assert on_ranks(2, _with_secret, secret, _bad_message) == ["done"] * 2


def _with_secret(member, secret, fn):
    os.environ["TCOMM_SECRET"] = secret
    return fn(member)


def _late(member):
    group = made(member, data_expiration_seconds=0.2)
    told = {}
    started = time.monotonic()
    if member.rank == 0:
        with pytest.raises(
            PeerTimeoutError, match=r"recv_obj: rank 1 \(pid \d+, running\) sent nothing within 0\.[3-9]"
        ):
            group.recv_obj(1, timeout=0.3)
        with pytest.raises(
            PeerTimeoutError, match=r"Barrier timed out after 0\.50 seconds on rank 0; ranks \[1\]"
        ):
            group.barrier(timeout=0.5)
        told["seconds"] = time.monotonic() - started
        member.meet("late")
    else:
        member.meet("late")
        # The barrier is over, for the one that comes late, too.
        with pytest.raises(
            PeerTimeoutError, match=r"Barrier timed out after 0\.50 seconds on rank 0; ranks \[1\]"
        ):
            group.barrier(timeout=20)
    group.barrier()
    member.meet("quiet")
    before = _keys(group)
    member.meet("counted")
    for _ in range(3):
        group.send_obj(bytes(3 << 20), 1 - member.rank)
    assert (len(group.entries), _keys(group) - before > 3) == (3, True)
    member.meet("sent")
    time.sleep(0.25)
    group.expire_data()
    member.meet("expired")
    assert (len(group.entries), _keys(group)) == (0, before)
    member.meet("looked")
    return told


def test_timeouts_are_kept_and_unread_messages_forgotten(on_ranks):
    told = on_ranks(2, _late)
    assert 0.8 <= told[0]["seconds"] < 3.0


def _gone(member, how, last):
    group = made(member)
    group.barrier()
    if member.rank == last:
        if how == "kill":
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGSTOP)
    started = time.monotonic()
    kinds = []
    seconds = 2.0 if how == "kill" else 0.5
    for call in (lambda: group.recv_obj(last, timeout=seconds), lambda: group.barrier(timeout=seconds / 2)):
        with pytest.raises((PeerLostError, PeerTimeoutError)) as caught:
            call()
        kinds.append((type(caught.value).__name__, str(caught.value), caught.value.peers))
    return kinds, time.monotonic() - started


def test_a_killed_rank_is_named(on_ranks):
    survivor = on_ranks(2, _gone, "kill", 1, check=False)[0].value
    (lost, failed), seconds = survivor
    assert (lost[0], lost[2]) == ("PeerLostError", (1,))
    assert "rank 1 ended (pid " in lost[1]
    assert failed[0] == "PeerLostError"
    assert "Barrier failed: rank 1 ended (pid " in failed[1]
    assert seconds < 3.0


def test_a_stopped_rank_0_does_not_stop_the_others(on_ranks):
    """Its process is the store's, which then answers nobody."""

    def revive(processes):
        deadline = time.monotonic() + 30
        while processes[1].is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        processes[0].kill()

    survivor = on_ranks(2, _gone, "stop", 0, check=False, during=revive)[1].value
    (silent, failed), seconds = survivor
    assert (silent[0], silent[2], failed[0]) == ("PeerTimeoutError", (0,), "PeerTimeoutError")
    assert "rank 0 does not answer: the store at 127.0.0.1:" in silent[1]
    assert seconds < 3.0


def test_a_killed_rank_0_takes_the_store_with_it(on_ranks):
    survivor = on_ranks(2, _gone, "kill", 0, check=False)[1].value
    (lost, _), seconds = survivor
    assert (lost[0], lost[2]) == ("PeerLostError", (0,))
    assert seconds < 3.0


def test_the_fields_are_those_that_callers_give_by_place():
    names = [field.name for field in dataclasses.fields(StatelessProcessGroup)]
    assert names[:10] == [
        "rank", "world_size", "store", "socket", "data_expiration_seconds", "send_dst_counter",
        "recv_src_counter", "broadcast_send_counter", "broadcast_recv_src_counter", "entries",
    ]  # fmt: skip
    group = StatelessProcessGroup(0, 2, dist.HashStore(), None)
    assert (group.send_dst_counter, group.recv_src_counter, group.broadcast_recv_src_counter) == (
        {0: 0, 1: 0},
    ) * 3
    with pytest.raises(ConfigError, match="rank 2 of 2 ranks"):
        StatelessProcessGroup(2, 2, dist.HashStore(), None)


def test_alone_everything_works_and_nothing_listens():
    group = StatelessProcessGroup.create("127.0.0.1", 0, 0, 1)
    group.barrier()
    group.send_obj([1], 0)
    assert group.recv_obj(0) == [1]
    assert group.all_gather_obj([2]) == [[2]]
    assert group.broadcast_obj("x", 0) == "x"
    x = torch.ones(2)
    assert group.broadcast(x, 0) is x
    assert group.all_reduce(x).tolist() == [1.0, 1.0]
    group.send(x, 0)
    assert group.recv(torch.zeros(2), 0).tolist() == [1.0, 1.0]
    group.expire_data()
    group.close()


def test_an_address_for_others_needs_a_secret(monkeypatch):
    monkeypatch.delenv("TCOMM_SECRET", raising=False)
    monkeypatch.delenv("VLLM_SECRET", raising=False)
    for rank in range(2):
        with pytest.raises(ConfigError, match="set TCOMM_SECRET"):
            StatelessProcessGroup.create("192.0.2.1", 5000, rank, 2)


def test_an_address_that_a_stranger_has_is_an_oserror():
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            StatelessProcessGroup.create("127.0.0.1", port, 0, 2, store_timeout=0.2)


def test_what_no_group_can_be_or_do_is_refused():
    for wrong in (True, "0", None, 1):
        with pytest.raises(ConfigError, match=f"rank {wrong!r} of 1 ranks"):
            StatelessProcessGroup(wrong, 1, dist.HashStore(), None)
    for name in ("store_timeout", "data_expiration_seconds"):
        with pytest.raises(ConfigError, match=f"{name} is 'x', which is not"):
            StatelessProcessGroup(0, 1, dist.HashStore(), None, **{name: "x"})
    for size in (1, 2):
        group = StatelessProcessGroup(0, size, dist.HashStore(), None)
        for wrong in ("x", 0, -1, True):
            with pytest.raises(ConfigError, match=f"timeout of barrier is {wrong!r}, which is not"):
                group.barrier(wrong)
    alone = StatelessProcessGroup(0, 1, dist.HashStore(), None)
    alone.barrier(None)
    alone.close()
    with pytest.raises(GroupClosedError):
        alone.barrier()


def test_none_is_the_timeout_of_the_store():
    group = StatelessProcessGroup(0, 2, dist.HashStore(), None, store_timeout=0.05)
    with pytest.raises(PeerTimeoutError, match=r"Barrier timed out after 0\.05 seconds"):
        group.barrier(None)

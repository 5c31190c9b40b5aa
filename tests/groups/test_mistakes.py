"""Mistakes that users made, each of which once crashed, corrupted or ended a group."""

import os

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import tcomm
import tcomm.functional
from tcomm.errors import ConfigError
from tests.groups.parallel.engine import engine


def _refuse(member):
    comm = member.communicator()
    comm.all_reduce(torch.ones(3))
    a = np.arange(40, dtype=np.float32)
    overlapping = torch.from_numpy(a[:20]), torch.from_numpy(a[8:28])
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    with torch.inference_mode():
        frozen = torch.ones(3)
    for args, kwargs in (
        ((overlapping[0],), {"out": overlapping[1]}),
        ((quantised,), {}),
        ((torch.ones(3),), {"out": frozen}),
    ):
        with pytest.raises(ConfigError):
            comm.all_reduce(*args, **kwargs)
    with pytest.raises(ConfigError, match="no integers"):
        comm.all_to_all_single(torch.ones(2), [1.0, 1.0], [1.0, 1.0])
    for wrong in (0, -1, 1.5, "1MiB", 2**80, None):
        with pytest.raises(ConfigError, match="not a positive number of bytes"):
            comm.prepare(wrong)
    total = comm.all_reduce(torch.ones(3)).tolist()
    comm.close()
    return total


def test_what_cannot_be_reduced_is_refused_and_the_group_lives_on(on_ranks):
    assert on_ranks(2, _refuse) == [[2.0] * 3] * 2


def _prepare_behind_asynchronous_calls(member):
    with member.communicator() as comm:
        works = []
        for turn in range(6):
            works.append(comm.all_reduce(torch.full((1 << 16,), float(turn)), async_op=True))
            comm.prepare(1 << 20)
        return [float(work.wait()[0]) for work in works]


def test_prepare_takes_its_turn_behind_asynchronous_calls(on_ranks):
    assert on_ranks(2, _prepare_behind_asynchronous_calls) == [[2.0 * turn for turn in range(6)]] * 2


def test_a_result_that_a_forked_child_holds_is_its_own():
    pool = tcomm.groups.communicator.Communicator()._pool
    result = pool.take(torch.Size([1 << 16]), torch.float32).fill_(2.0)
    go, seen = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go[0], 1)
        os.write(seen[1], b"2" if float(result[0]) == 2.0 else b"x")
        os._exit(0)
    del result
    held = [pool.take(torch.Size([1 << 16]), torch.float32).fill_(7.0) for _ in range(3)]
    os.write(go[1], b"x")
    assert os.read(seen[0], 1) == b"2"
    os.waitpid(child, 0)
    for fd in (*go, *seen):
        os.close(fd)
    assert len(held) == 3


def _nested(verb):
    return verb(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


def _dual(verb):
    with forward_ad.dual_level():
        return verb(forward_ad.make_dual(torch.ones(4), torch.ones(4)))


def _fake(verb):
    x = torch.ones(4)
    with FakeTensorMode():
        return verb(x)


def _of_one(verb):
    """make_fx wants to know how many arguments there are."""

    def call(x):
        return verb(x)

    return call


TRACED = {
    "vmap": lambda verb: torch.func.vmap(verb)(torch.ones(3, 4)),
    "jvp": lambda verb: torch.func.jvp(verb, (torch.ones(4),), (torch.ones(4),)),
    "grad": lambda verb: torch.func.grad(lambda x: verb(x).sum())(torch.ones(4)),
    "functionalize": lambda verb: torch.func.functionalize(verb)(torch.ones(4)),
    "make_fx": lambda verb: make_fx(_of_one(verb))(torch.ones(4)),
    "make_fx before dispatch": lambda verb: make_fx(_of_one(verb), pre_dispatch=True)(torch.ones(4)),
    "jit": lambda verb: torch.jit.trace(verb, torch.ones(4)),
    "jit of a number": lambda verb: torch.jit.trace(verb, torch.ones(())),
    "nested": _nested,
    "dual": _dual,
    "fake": _fake,
    "fake outside of its mode": lambda verb: verb(FakeTensorMode().from_tensor(torch.ones(4))),
}


def _traced(member):
    comm = member.communicator()
    found = {}
    verbs = {
        "all_reduce": comm.all_reduce,
        "all_reduce into": lambda x: comm.all_reduce(x, out=torch.empty(4)),
        "all_gatherv": lambda x: comm.all_gatherv(x, None if x.dim() == 0 else [4, 4]),
        "send": lambda x: comm.send(x, 1 - comm.rank),
    }
    for warm in (False, True):
        # Before there is a plan for such tensors, and when there is.
        for name, verb in verbs.items():
            for tracer, trace in TRACED.items():
                try:
                    trace(verb)
                    found[name, tracer, warm] = "nothing was raised"
                except ConfigError:
                    pass
        assert comm.all_reduce(torch.ones(4)).tolist() == [2.0] * 4
        assert comm.all_reduce(torch.ones(())).item() == 2.0
        comm.all_gatherv(torch.ones(4), [4, 4])
        comm.recv(torch.ones(4), 0) if comm.rank else comm.send(torch.ones(4), 1)
    with forward_ad.dual_level(), pytest.raises(ConfigError, match="forward-mode"):
        comm.all_reduce(torch.ones(4), out=forward_ad.make_dual(torch.ones(4), torch.ones(4)))
    with forward_ad.dual_level():
        assert comm.all_reduce(torch.ones(4)).tolist() == [2.0] * 4
    comm.close()
    return found


def test_tensors_of_tracers_and_transforms_reach_no_memory_and_end_no_group(on_ranks):
    assert on_ranks(2, _traced) == [{}] * 2


def _under_a_default_device(member):
    x, rows = torch.arange(4.0), torch.arange(8.0).view(4, 2)
    bits = torch.tensor([True, False])
    with torch.device("meta"), engine(member, tp=2) as state:
        group, world = state.get_tp_group(), state.get_world_group()
        rank, communicator = member.rank, state.get_tp_group().device_communicator.communicator
        halves = torch.ones(3, dtype=torch.bfloat16, device="cpu")
        results = [
            group.all_reduce(x),
            group.all_reduce(rows[:, 0]),
            group.all_gather(rows, 1),
            group.reduce_scatter(rows, 1),
            group.all_gatherv(x[: 1 + rank], 0, [1, 2]),
            group.reduce_scatterv(rows, 0, [3, 1]),
            group.broadcast(x.clone(), 0),
            group.cpu_all_reduce_(x.clone()),
            group.all_reduce(bits),
            communicator.all_reduce(halves, "avg"),
            communicator.all_reduce(torch.ones(1 << 16, device="cpu")),
            tcomm.functional.all_reduce(x, group),
        ]
        communicator.prepare(1 << 20)
        group.barrier()
        if rank == 0:
            group.send_object({"t": x}, 1)
            group.send_tensor_dict({"t": x}, 1)
            world.broadcast_object([1, x], 0)
        else:
            results += [group.recv_object(0)["t"], group.recv_tensor_dict(0)["t"]]
            results.append(world.broadcast_object(None, 0)[1])
    return [y.device.type for y in results], [y.float().sum().item() for y in results]


def test_a_default_device_is_not_where_results_or_shared_memory_are_made(on_ranks):
    outcomes = on_ranks(2, _under_a_default_device)
    for rank, (devices, sums) in enumerate(outcomes):
        assert set(devices) == {"cpu"}
        scattered, ragged = [(24.0, 30.0), (32.0, 26.0)][rank]
        assert sums[:12] == [12.0, 24.0, 56.0, scattered, 1.0, ragged, 6.0, 12.0, 1.0, 3.0, 131072.0, 12.0]
        assert sums[12:] == [6.0] * (3 * rank)

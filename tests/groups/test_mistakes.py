"""Mistakes that users made, each of which once crashed, corrupted or ended a group."""

import os

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tcomm
from tcomm.errors import ConfigError


def _refuse(member):
    comm = member.communicator()
    comm.all_reduce(torch.ones(3))
    a = np.arange(40, dtype=np.float32)
    overlapping = torch.from_numpy(a[:20]), torch.from_numpy(a[8:28])
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    with torch.inference_mode():
        frozen = torch.ones(3)
    for args, kwargs in (
        ((FakeTensorMode().from_tensor(torch.ones(3)),), {}),
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

import pytest
import torch

from tests.faults.worlds import KINDS, failure_of, group, reduce_ones

WRONG_CALLS = {
    "root too large": (lambda comm: comm.broadcast(torch.ones(4), 2), "root=2"),
    "root negative": (lambda comm: comm.broadcast(torch.ones(4), -1), "root=-1"),
    "root no number": (lambda comm: comm.broadcast(torch.ones(4), "0"), "root='0'"),
    "root of reduce": (lambda comm: comm.reduce(torch.ones(4), 2), "root=2"),
    "root of gather": (lambda comm: comm.gather(torch.ones(4), None), "root=None"),
    "root of scatter": (lambda comm: comm.scatter(torch.ones(4), 2.5), "root=2.5"),
    "dst too large": (lambda comm: comm.send(torch.ones(4), 2), "dst=2"),
    "dst negative": (lambda comm: comm.send(torch.ones(4), -2), "dst=-2"),
    "dst itself": (lambda comm: comm.send(torch.ones(4), comm.rank), "rank itself"),
    "src too large": (lambda comm: comm.recv(torch.ones(4), 99), "src=99"),
    "src itself": (lambda comm: comm.recv(torch.ones(4), comm.rank), "rank itself"),
}


def _wrong_on_rank_0(member, kind):
    failures = {}
    with group(member, kind) as comm:
        for name, (call, _) in WRONG_CALLS.items():
            if member.rank == 0:
                failures[name] = failure_of(call, comm)
            x = torch.full((4,), float(member.rank))
            assert torch.equal(comm.broadcast(x, 1, algorithm=KINDS[kind]), torch.ones(4))
            reduce_ones(comm, kind)
        if member.rank == 0:
            comm.send(torch.arange(4.0), 1)
        else:
            assert torch.equal(comm.recv(torch.zeros(4), 0), torch.arange(4.0))
    return failures


@pytest.mark.parametrize("kind", ["torch", "remote"])
def test_f13_a_rank_out_of_range_is_refused_and_nothing_was_sent(world, kind):
    failures, _ = world(2, _wrong_on_rank_0, kind)
    for name, (_, told) in WRONG_CALLS.items():
        assert failures[name].kind == "ConfigError", failures[name]
        assert told in failures[name].text, failures[name]
        assert failures[name].seconds < 0.2


def _wrong_without_a_process_group(member):
    with group(member) as comm:
        told = {name: failure_of(call, comm).kind for name, (call, _) in WRONG_CALLS.items()}
        reduce_ones(comm)
        return told


def test_f13_a_rank_out_of_range_is_refused_where_nothing_could_be_sent_anyway(world):
    for told in world(2, _wrong_without_a_process_group):
        assert set(told.values()) == {"ConfigError"}, told

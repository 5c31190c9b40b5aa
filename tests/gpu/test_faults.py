"""A rank that never comes is an error with a name, and the CUDA context lives on."""

import time

import pytest
import torch

from tests import virtual_worlds as worlds
from tests.virtual_worlds import CASES

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(120)]


@pytest.mark.parametrize(("verb", "algorithm"), CASES)
def test_a_rank_that_never_comes_is_named(verb, algorithm):
    started = time.monotonic()
    worlds.check_missing_rank("cuda", 4, verb, algorithm, missing=2, timeout=0.5)
    # With all compilation, and a second world.
    assert time.monotonic() - started < 60
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_the_deadline_is_kept():
    ranks = worlds.make("cuda", 2, "streams")
    x = worlds.put(ranks, [torch.ones(100)] * 2)
    ranks.all_reduce(x)
    ranks.check()
    worlds.without(ranks, 0)
    started = time.monotonic()
    error = worlds.failure_of(ranks, lambda: ranks.all_reduce(x, timeout=1.0))
    assert 0.9 < time.monotonic() - started < 3.0
    assert (error.rank, tuple(error.peers)) == (1, (0,))


def test_a_graph_with_a_rank_that_never_comes_ends():
    ranks = worlds.make("cuda", 3, "streams", timeout=0.5)
    x = worlds.put(ranks, [torch.ones(100)] * 3)
    ranks.all_reduce(x)
    ranks.check()
    worlds.without(ranks, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ranks.all_reduce(x)
    error = worlds.failure_of(ranks, graph.replay)
    assert tuple(error.peers) == (1,)


def test_the_host_ends_a_wait_without_a_deadline():
    ranks = worlds.make("cuda", 2, "streams", timeout=None)
    x = worlds.put(ranks, [torch.ones(100)] * 2)
    ranks.all_reduce(x)
    ranks.check()
    worlds.without(ranks, 1)
    ranks.all_reduce(x)
    done = torch.cuda.Event()
    done.record()
    try:
        time.sleep(1.0)
        assert not done.query(), "the kernel did not wait"
    finally:
        ranks.arena.channel.abort()
    error = worlds.failure_of(ranks, lambda: None)
    assert "(no deadline)" in str(error)
    assert tuple(error.peers) == (1,)
    assert worlds.mistake(worlds.make("cuda", 2), 0, "all_reduce", "two_shot", torch.float32, 100) == ""

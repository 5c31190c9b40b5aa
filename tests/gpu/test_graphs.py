"""Capture and replay: the host is out of it, the epochs live on the device."""

import random

import pytest
import torch

from tcomm.errors import CapabilityError
from tests import virtual_worlds as worlds
from tests.virtual_worlds import CASES

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(240)]
NUMEL = 5008


class Captured:
    """A graph of one call of each case, whose inputs can be changed."""

    def __init__(self, ranks, cases=CASES, numel=NUMEL, seeds=3):
        self.ranks = ranks
        self.inputs, self.wanted = [], []
        for verb, _ in cases:
            rounds = [
                worlds.make_inputs(verb, seed, ranks.world_size, numel, torch.bfloat16)
                for seed in range(seeds)
            ]
            self.inputs.append([torch.stack(inputs).cuda() for inputs in rounds])
            self.wanted.append([worlds.meaning(verb, inputs).cuda() for inputs in rounds])
        self.x = [ranks.empty(numel, dtype=torch.bfloat16) for _ in cases]
        # Once before: nothing is compiled, loaded or made during a capture.
        for x, (verb, algorithm) in zip(self.x, cases, strict=True):
            x.zero_()
            worlds.call(ranks, verb, algorithm, x)
        ranks.check()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = [
                worlds.call(ranks, verb, algorithm, x)
                for x, (verb, algorithm) in zip(self.x, cases, strict=True)
            ]

    def replay(self, seed):
        """On the inputs of that seed; the number of wrong elements, on the device."""
        for x, inputs in zip(self.x, self.inputs, strict=True):
            x.copy_(inputs[seed])
        self.graph.replay()
        pairs = zip(self.out, self.wanted, strict=True)
        return sum(worlds.count_different(out, wanted[seed]) for out, wanted in pairs)


@pytest.mark.parametrize("world", [2, 4, 8], ids="{}ranks".format)
def test_a_graph_is_replayed_a_thousand_times_on_new_inputs(world):
    ranks = worlds.make("cuda", world)
    captured = Captured(ranks)
    before = worlds.epochs(ranks)[0]
    wrong = sum(captured.replay(index % 3) for index in range(1000))
    ranks.check()
    assert int(wrong) == 0
    assert worlds.epochs(ranks) == [before + 1000 * len(CASES)] * world


def test_replays_of_launches_of_their_own_4ranks():
    captured = Captured(worlds.make("cuda", 4, "streams"))
    assert int(sum(captured.replay(index % 3) for index in range(100))) == 0
    captured.ranks.check()


def test_replays_across_the_wrap_of_the_epochs_4ranks():
    captured = Captured(worlds.make("cuda", 4))
    captured.ranks.arena.set_epoch(2**32 - 25)
    assert int(sum(captured.replay(index % 3) for index in range(10))) == 0
    captured.ranks.check()
    assert worlds.epochs(captured.ranks)[0] == 10 * len(CASES) - 25


def test_eager_calls_and_replays_of_several_graphs_mix_4ranks():
    ranks = worlds.make("cuda", 4)
    graphs = [
        Captured(ranks),
        Captured(ranks, CASES[::-1], 24),
        Captured(ranks, [("all_reduce", "one_shot_ll")] * 3, 1001),
    ]
    jobs = worlds.make_jobs(ranks, (1, 1001, 40_000), (torch.bfloat16,))
    order, wrong = random.Random(4), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(400):
        if order.random() < 0.5:
            wrong += order.choice(graphs).replay(order.randrange(3))
        else:
            verb, algorithm, x, want = order.choice(jobs)
            wrong += worlds.count_different(worlds.call(ranks, verb, algorithm, x), want)
    ranks.check()
    assert int(wrong) == 0


def test_a_graph_outlives_the_staging_that_it_was_captured_with_2ranks():
    ranks = worlds.make("cuda", 2)
    captured = Captured(ranks)
    ranks.prepare(4 << 20)
    torch.cuda.empty_cache()
    junk = [torch.full((1 << 20,), 0x7F, dtype=torch.uint8, device="cuda") for _ in range(16)]
    job = worlds.make_jobs(ranks, (1001,), (torch.float32,))[0]
    for index in range(20):
        assert int(captured.replay(index % 3)) == 0
        assert worlds.run_jobs(ranks, [job], 1, random.Random(0)) == 0
    assert all(bool((each == 0x7F).all()) for each in junk)


def test_what_has_to_be_made_is_refused_during_a_capture_2ranks():
    # Staging of a size that no other test has, and so kernels that nobody has compiled.
    ranks = worlds.make("cuda", 2, staging_bytes=(1 << 20) + 12 * 4096)
    x = ranks.empty(NUMEL).fill_(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(CapabilityError, match=r"compiled and loaded.*call prepare\(max_nbytes, dtypes\)"):
            ranks.all_reduce(x)
        with pytest.raises(CapabilityError, match=r"staging has to be made.*call prepare"):
            ranks.prepare(1 << 20)
    # Nothing was sent, so nothing is out of step.
    assert worlds.mistake(ranks, 0, "all_reduce", "two_shot", torch.float32, NUMEL) == ""


def test_prepare_is_all_that_a_capture_needs_2ranks():
    ranks = worlds.make("cuda", 2, staging_bytes=(1 << 20) + 13 * 4096)
    ranks.prepare((1 << 20) + 5 * 4096, [torch.float32])
    x = ranks.empty(4096).fill_(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ranks.all_reduce(x, algorithm="one_shot_push")
    graph.replay()
    ranks.check()
    assert bool((y == 2).all())

import pytest
import torch

from tcomm.config import Config
from tcomm.errors import CollectiveMismatchError
from tcomm.groups import plans
from tcomm.groups.agreement import SharedAgreement
from tcomm.groups.jobs import JOBS, Caller
from tcomm.groups.plans import Planner
from tcomm.groups.pool import ResultPool
from tcomm.memory.arena import open_arena
from tcomm.tuning.choose import Decision, Request


def _decision(algorithm, nbytes=12, piece_nbytes=0, world_size=2):
    request = Request("all_reduce", "sum", torch.float32, nbytes, world_size)
    return Decision(request, algorithm, "a test", (), piece_nbytes)


def _plan(planner, decision, numel=3):
    job = JOBS["all_reduce"](Caller(0, 2, torch.Size([numel]), torch.float32), "sum")
    return planner.plan(job, decision, 20.0, ResultPool())


def _planner(member, **variables):
    arena = open_arena("plans", member.exchange("plans"), Config().shm_dir, 20, 20.0)
    config = Config(staging_bytes=128 * 1024, **variables)
    return Planner("plans", config, arena, None, SharedAgreement(arena.channel), 20.0), arena


def _staging_comes_with_the_first_plan(member):
    planner, arena = _planner(member)
    local = _plan(planner, _decision("local:copy"))
    x, out = torch.ones(3), torch.zeros(3)
    local(x, out, None)
    local(x, x, None)
    assert (x.tolist(), out.tolist()) == ([1.0] * 3, [1.0] * 3)
    assert arena.staging is None
    epoch = arena.channel.words[24]
    plan = _plan(planner, _decision("cpu:two_shot"))
    assert arena.staging.layout.nbytes == 128 * 1024
    assert arena.channel.words[24] == epoch + 1
    staging = arena.staging
    _plan(planner, _decision("triton:two_shot"))
    assert arena.staging is staging
    assert arena.channel.words[24] == epoch + 1
    plan(x, out, 20.0)
    return out.tolist()


def test_staging_is_made_once_and_only_when_a_plan_needs_it(on_ranks):
    assert on_ranks(2, _staging_comes_with_the_first_plan) == [[2.0] * 3] * 2


def _first_calls_differ(member):
    planner, arena = _planner(member)
    with pytest.raises(CollectiveMismatchError) as caught:
        _plan(planner, _decision("cpu:two_shot"), 3 + member.rank)
    assert arena.staging is None
    _plan(planner, _decision("cpu:two_shot"))
    return str(caught.value)


def test_staging_is_not_made_while_the_first_calls_differ(on_ranks):
    told = on_ranks(2, _first_calls_differ)
    assert told[0] == told[1]
    assert "  rank 0: all_reduce float32 [3] sum via cpu:two_shot" in told[0]
    assert "  rank 1: all_reduce float32 [4] sum via cpu:two_shot" in told[0]


def _pieces(member):
    planner, arena = _planner(member)
    x, out = torch.arange(3000.0), torch.empty(3000)
    counts = []
    for piece_nbytes in (0, 4096, 1000):
        plan = _plan(planner, _decision("cpu:one_shot_pull", 12000, piece_nbytes), 3000)
        before = arena.channel.words[24]
        plan(x, out, 20.0)
        assert out.equal(2 * x)
        counts.append(arena.channel.words[24] - before)
    return counts


def test_the_piece_size_of_the_decision_is_kept(on_ranks):
    # 1000 bytes hold 896 of whole cache lines.
    assert on_ranks(2, _pieces) == [[1, 3, 14]] * 2


class _Recorder:
    """Stands for a fallback and an agreement."""

    rank, world_size, group = 0, 2, None

    def __init__(self):
        self.calls = []

    def agree(self, call, timeout):
        self.calls.append(("agree", call.algorithm, timeout))

    def run(self, op, timeout, start, on_stream):
        assert not on_stream
        self.calls.append((op, timeout))


def test_the_fallback_is_agreed_on_before_each_call_and_logged_once(monkeypatch):
    recorder, logged = _Recorder(), []
    monkeypatch.setattr(plans.logger, "info", lambda text, *args: logged.append(text % args))
    planner = Planner("tp", Config(), None, recorder, recorder, 20.0)
    for _ in range(2):
        plan = _plan(planner, _decision("torch:gloo"))
        plan(torch.ones(3), torch.ones(3), 7.0)
    assert recorder.calls == [("agree", "torch:gloo", 7.0), ("all_reduce", 7.0)] * 2
    assert logged == ["group 'tp': all_reduce goes to torch:gloo: a test"]

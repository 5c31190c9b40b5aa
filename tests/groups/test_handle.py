import os
import time

import pytest
import torch

import tcomm
from tcomm.config import Config
from tcomm.errors import CapabilityError, ConfigError, GroupClosedError, RendezvousError
from tcomm.groups import handle


def _alone():
    assert not torch.distributed.is_initialized()
    return tcomm.Communicator()


def test_a_world_of_one_needs_nobody():
    with _alone() as comm:
        x = torch.tensor([[1, 2], [3, 4]])
        assert (comm.rank, comm.world_size, comm.global_ranks) == (0, 1, (0,))
        assert comm.all_reduce(x).tolist() == x.tolist()
        assert comm.all_reduce(x).data_ptr() != x.data_ptr()
        assert comm.all_reduce(x, out=x) is x
        assert comm.all_reduce(x.t(), "max").tolist() == [[1, 3], [2, 4]]
        comm.prepare(1000)
        comm.barrier()
        assert comm.explain("all_reduce", nbytes=4).algorithm == "local:copy"


def test_a_world_of_one_keeps_gradients():
    with _alone() as comm:
        x = torch.ones(3, requires_grad=True)
        comm.all_reduce(x).sum().backward()
        assert x.grad.tolist() == [1.0, 1.0, 1.0]


def test_a_closed_group_is_refused_and_may_be_closed_again():
    comm = _alone()
    comm.close()
    comm.close()
    calls = [
        lambda: comm.all_reduce(torch.ones(1)),
        lambda: comm.all_reduce(torch.ones(1), async_op=True),
        comm.barrier,
        lambda: comm.prepare(1),
        lambda: comm.broadcast(torch.ones(1), 0),
    ]
    for call in calls:
        with pytest.raises(GroupClosedError) as caught:
            call()
        assert str(caught.value) == "group 'alone' cannot be used: it was closed"
        assert (caught.value.group, caught.value.rank) == ("alone", 0)


def test_a_with_block_closes_also_when_it_fails():
    with pytest.raises(ZeroDivisionError), _alone() as comm:
        raise ZeroDivisionError
    with pytest.raises(GroupClosedError):
        comm.barrier()


@pytest.mark.parametrize(
    ("variable", "argument", "seconds"),
    [
        ("", {}, 120.0),
        ("ml_inference", {}, 600.0),
        ("7", {}, 7.0),
        ("7", {"timeout": "streaming"}, 1800.0),
        ("7", {"timeout": None}, None),
        ("7", {"timeout": "batch_job"}, None),
        ("", {"timeout": 0.5}, 0.5),
    ],
)
def test_a_timeout_comes_from_the_argument_then_the_variable(monkeypatch, variable, argument, seconds):
    if variable:
        monkeypatch.setenv("TCOMM_TIMEOUT", variable)
    with tcomm.Communicator(**argument) as comm:
        assert comm.timeout == seconds


def test_a_bad_timeout_is_refused_when_the_group_is_made():
    with pytest.raises(ConfigError, match="timeout 'soon' is neither seconds nor one of default"):
        tcomm.Communicator(timeout="soon")


def _shown(member):
    with member.communicator(name="tp") as comm:
        return repr(comm)


def test_a_group_shows_its_rank_and_its_memory(on_ranks):
    assert on_ranks(2, _shown)[1] == "<Communicator 'tp' rank 1 of 2 over shared memory>"
    with _alone() as comm:
        assert "rank 0 of 1" in repr(comm)


def _missing(member):
    handle.SETUP_SECONDS = 1.0
    if member.rank == 2:
        return ""
    started = time.monotonic()
    with pytest.raises(RendezvousError) as caught:
        member.communicator(name="tp")
    assert 0.9 < time.monotonic() - started < 10
    return str(caught.value)


def test_a_rank_that_does_not_come_is_named(on_ranks):
    first, second, _ = on_ranks(3, _missing)
    assert first == second
    assert first.startswith("ranks [2] of 3 did not come to 'tcomm/tp/1' within 1 s; check that they are")


def _inference_mode(member):
    comm, results = member.communicator(), []
    algorithms = ["cpu:one_shot_push", "cpu:one_shot_pull", "cpu:two_shot", "triton:two_shot"]
    for algorithm in algorithms:
        x = torch.ones(8, dtype=torch.bfloat16)
        with torch.inference_mode():
            results.append(comm.all_reduce(x, "avg", algorithm=algorithm))
        results.append(comm.all_reduce(x, "avg", algorithm=algorithm))
        with torch.inference_mode():
            y = torch.ones(8, dtype=torch.bfloat16)
            results.append(comm.all_reduce(y, "avg", algorithm=algorithm, out=y))
    comm.close()
    return [result.tolist() for result in results]


def test_a_group_first_used_in_inference_mode_works_outside_of_it(on_ranks):
    assert on_ranks(2, _inference_mode) == [[[1.0] * 8] * 12] * 2


def _modes_of_the_caller(member):
    comm = member.communicator()
    x = torch.ones(4, requires_grad=True)
    with torch.no_grad():
        assert comm.all_reduce(x, async_op=True).wait().tolist() == [2.0] * 4
    with torch.inference_mode():
        y = torch.ones(4)
        assert comm.all_reduce(y, out=y, async_op=True).wait() is y
    total = comm.all_reduce(torch.ones(4)).tolist()
    comm.close()
    return y.tolist(), total


def test_an_asynchronous_call_runs_in_the_modes_of_its_caller(on_ranks):
    assert on_ranks(2, _modes_of_the_caller) == [([2.0] * 4, [2.0] * 4)] * 2


def _variables(member, name, values):
    os.environ[name] = values[member.rank]
    handle.SETUP_SECONDS = 5.0
    try:
        with member.communicator() as comm:
            comm.all_reduce(torch.ones(1000))
            return comm.explain("all_reduce", nbytes=4000).algorithm, comm._arena.staging.layout.nbytes
    except tcomm.TcommError as error:
        return type(error).__name__, str(error)


def test_variables_set_the_algorithm_and_the_staging(on_ranks):
    default = Config().staging_bytes
    assert on_ranks(2, _variables, "TCOMM_ALGORITHM", ["two_shot"] * 2) == [("cpu:two_shot", default)] * 2
    seen = on_ranks(2, _variables, "TCOMM_STAGING_BYTES", ["131072"] * 2)
    assert seen == [("cpu:one_shot_pull", 131072)] * 2


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("TCOMM_ALGORITHM", ["", "two_shot", ""]),
        ("TCOMM_STAGING_BYTES", ["65536", "65536", "131072"]),
        ("TCOMM_DETERMINISTIC", ["0", "1", "0"]),
    ],
)
def test_ranks_with_other_settings_are_told_so_in_a_table(on_ranks, name, values):
    lines = [f"    rank {rank}: {value!r}" for rank, value in enumerate(values)]
    table = ["the ranks of group 'test' have different settings", f"  {name}:", *lines, "make them the same"]
    assert on_ranks(3, _variables, name, values) == [("GroupMismatchError", "\n".join(table))] * 3


def test_staging_that_is_too_small_is_refused_on_every_rank(on_ranks):
    told = "staging of 4096 bytes a rank is too small; give at least 65536"
    assert on_ranks(2, _variables, "TCOMM_STAGING_BYTES", ["4096"] * 2) == [("ConfigError", told)] * 2


def _no_shared_memory(member, with_process_group):
    if with_process_group:
        member.process_group()
    handle.open_arena = lambda *_: tcomm.memory.base.NotShared("the ranks are on two moons")
    try:
        comm = tcomm.Communicator(name="tp") if with_process_group else member.communicator(name="tp")
    except CapabilityError as error:
        return str(error)
    with comm:
        results = [comm.all_reduce(torch.ones(3)).tolist(), comm.all_reduce(torch.ones(2), "avg").tolist()]
        decision = comm.explain("all_reduce", nbytes=12)
        comm.barrier()
        comm.prepare(100)
        return results, decision.algorithm, decision.reason, repr(comm)


def test_without_shared_memory_there_is_gloo_or_an_error_that_says_why(on_ranks):
    expected = (
        [[2.0] * 3, [1.0] * 2],
        "torch:gloo",
        "the ranks are on two moons",
    )
    for rank, seen in enumerate(on_ranks(2, _no_shared_memory, True)):
        assert seen == (*expected, f"<Communicator 'tp' rank {rank} of 2 over torch.distributed>")
    assert (
        on_ranks(2, _no_shared_memory, False)
        == [
            "the ranks of group 'tp' share no memory and there is no process group behind it; "
            "make the communicator from a torch.distributed process group"
        ]
        * 2
    )

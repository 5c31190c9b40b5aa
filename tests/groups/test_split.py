import contextlib
import threading

import pytest
import torch

import tcomm
from tcomm.errors import CollectiveMismatchError, ConfigError, GroupClosedError


def _own_epochs(member):
    comm = member.communicator()
    other = comm.split()
    assert other.name == "test/split0"
    for _ in range(3):
        other.all_reduce(torch.ones(4))
    comm.all_reduce(torch.ones(4))
    epochs = [c._arena.channel.words[tcomm.memory.control.Word.EPOCH] for c in (comm, other)]
    named = comm.split("dispatch", timeout=7.0)
    comm.close()
    # The others live on.
    assert torch.equal(other.all_reduce(torch.ones(2)), torch.full((2,), float(member.world_size)))
    assert (named.name, named.timeout) == ("test/dispatch", 7.0)
    assert named.all_reduce(torch.ones(1)).item() == member.world_size
    return epochs


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_split_has_memory_and_epochs_of_its_own(on_ranks, world_size):
    def run():
        return on_ranks(world_size, _own_epochs) if world_size > 1 else []

    for mine, others in run():
        # One call, the agreement on the split, and that on the second.
        assert (mine >= 2, others >= 3, mine != others) == (True, True, True)


def _at_once(member):
    comm = member.communicator()
    other = comm.split()
    results = {}

    def call(name, communicator, count):
        for i in range(count):
            results[name] = communicator.all_reduce(torch.full((100,), float(member.rank + i)))

    # In opposite orders on two ranks: with one order of calls this would never end.
    pairs = [("comm", comm, 40), ("other", other, 40)]
    threads = [threading.Thread(target=call, args=p) for p in (pairs if member.rank else pairs[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[name].tolist() for name in ("comm", "other")]


def test_calls_of_a_split_overlap_with_those_of_its_parent(on_ranks):
    wanted = [float(0 + 39 + 1 + 39)] * 100
    assert on_ranks(2, _at_once) == [[wanted, wanted]] * 2


def _different_names(member):
    comm = member.communicator()
    with pytest.raises(CollectiveMismatchError, match=r"rank 0: split .*\n.*rank 1: split"):
        comm.split(f"group of {member.rank}")
    assert comm.all_reduce(torch.ones(1)).item() == 2
    assert comm.split().all_reduce(torch.ones(1)).item() == 2


def test_splits_of_different_names_are_a_mismatch(on_ranks):
    on_ranks(2, _different_names)


def _fallback(member):
    member.process_group()
    comm = tcomm.Communicator(name="parent", timeout=20.0)
    other = comm.split("child")
    assert other.global_ranks == comm.global_ranks
    total = other.all_reduce(torch.ones(3, dtype=torch.uint8))
    assert total.tolist() == [2, 2, 2]
    assert other.explain("all_reduce", dtype=torch.uint8).algorithm == "torch:gloo"
    other.close()
    assert comm.all_reduce(torch.ones(3, dtype=torch.uint8)).tolist() == [2, 2, 2]
    comm.close()


def test_a_split_falls_back_to_the_same_process_group(on_ranks):
    on_ranks(2, _fallback)


def test_a_closed_communicator_does_not_split():
    comm = tcomm.Communicator()
    other = comm.split()
    comm.close()
    with pytest.raises(GroupClosedError):
        comm.split()
    assert other.all_reduce(torch.ones(1)).item() == 1


def test_graph_capture_is_a_barrier_and_no_more_without_a_gpu():
    comm = tcomm.Communicator()
    with tcomm.graph_capture(comm, device="cpu") as outer:
        assert outer.stream is None
        with tcomm.graph_capture(comm, device="cpu", context=outer) as inner:
            assert inner is outer


def test_graph_capture_takes_communicators_only():
    with pytest.raises(ConfigError, match=r"'tp' is no Communicator"), tcomm.graph_capture("tp"):
        pass


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((1000, ["fp32"]), "dtypes has 'fp32', which is no torch.dtype"),
        ((1000, (), ["mean"]), "'mean' is unknown"),
    ],
)
def test_prepare_refuses_what_is_no_dtype_or_operation(arguments, told):
    with pytest.raises(ConfigError, match=told):
        tcomm.Communicator().prepare(*arguments)


def _prepared_for_others(member):
    comm = member.communicator()
    with pytest.raises(CollectiveMismatchError):
        comm.prepare(1000, [torch.float32] if member.rank else [torch.bfloat16])
    comm.prepare(1000, [torch.float32], ["sum", "max"])
    assert comm.all_reduce(torch.ones(1)).item() == 2


def test_ranks_that_prepare_for_different_dtypes_are_told(on_ranks):
    on_ranks(2, _prepared_for_others)


def test_an_asynchronous_call_runs_on_the_stream_that_it_was_made_on(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def on_stream(stream):
        entered.append((stream, threading.current_thread() is threading.main_thread()))
        yield

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream of the caller")
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    comm = tcomm.Communicator()
    assert comm.all_reduce(torch.ones(1), async_op=True).wait().item() == 1
    assert entered == [("the stream of the caller", False)]

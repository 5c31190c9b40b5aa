import time
import types

import pytest
import torch
import torch.distributed as dist

import tcomm
from tcomm.errors import CapabilityError, CommError, PeerLostError, PeerTimeoutError
from tcomm.groups.fallback import TorchFallback
from tcomm.groups.torch_verbs import make_torch_plan
from tcomm.signature import CallDescription


def _fallback(member):
    member.process_group()
    return TorchFallback("tp", dist.group.WORLD, None)


def _all_reduce(fallback, x, out, op, timeout=20.0):
    make_torch_plan(fallback, CallDescription("all_reduce", reduce=op), None)(x, out, timeout)


def _bytes(member):
    fallback = _fallback(member)
    payload = bytes([member.rank]) * (3 * member.rank)
    assert fallback.backends == (("cpu", "gloo"),) or ("cpu", "gloo") in fallback.backends
    return fallback.gather_bytes(payload, 16, 20.0)


def test_bytes_of_different_lengths_are_gathered(on_ranks):
    assert on_ranks(3, _bytes) == [[b"", b"\1" * 3, b"\2" * 6]] * 3


def test_bytes_go_by_a_device_where_no_backend_moves_host_memory(monkeypatch):
    asked = []
    group = types.SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    monkeypatch.setattr(TorchFallback, "backends", (("meta", "nccl"),))
    monkeypatch.setattr(TorchFallback, "run", lambda self, op, timeout, start: start())
    monkeypatch.setattr(dist, "all_gather", lambda rows, mine, **_: asked.extend([*rows, mine]))
    with pytest.raises(NotImplementedError):
        TorchFallback("tp", group, None).gather_bytes(b"x", 16, 1.0)
    assert [x.device.type for x in asked] == ["meta", "meta"]


def _reduces(member):
    fallback, seen = _fallback(member), []
    for op, dtype in [
        ("sum", torch.int8),
        ("avg", torch.float32),
        ("bxor", torch.int32),
        ("product", torch.int64),
    ]:
        x, out = torch.tensor([3, 5]).to(dtype) + member.rank, torch.zeros(2, dtype=dtype)
        _all_reduce(fallback, x, out, op)
        _all_reduce(fallback, x, x, op)
        assert x.equal(out)
        seen.append(out.tolist())
    return seen


def test_operations_are_torchs(on_ranks):
    assert on_ranks(2, _reduces) == [[[7, 11], [3.5, 5.5], [3 ^ 4, 5 ^ 6], [12, 30]]] * 2


def _cannot(member):
    fallback, told = _fallback(member), []
    for dtype, op in [(torch.int16, "sum"), (torch.float8_e4m3fn, "sum")]:
        x = torch.ones(3).to(dtype)
        with pytest.raises(CapabilityError) as caught:
            _all_reduce(fallback, x, x, op)
        told.append(str(caught.value))
    with pytest.raises(CommError) as caught:
        _all_reduce(fallback, torch.ones(3), torch.ones(3), "band")
    return told, str(caught.value), caught.value.op, caught.value.rank


def test_what_torch_cannot_do_is_a_capability_and_other_refusals_name_the_verb(on_ranks):
    for rank, (told, band, op, culprit) in enumerate(on_ranks(2, _cannot)):
        assert all(line.startswith("torch.distributed cannot do this all_reduce: ") for line in told)
        assert band.startswith("all_reduce of group 'tp' failed in torch.distributed: ")
        assert (op, culprit) == ("all_reduce", rank)


def _complex(member):
    member.process_group()
    with tcomm.Communicator() as comm:
        x = torch.tensor([1 + 2j])
        assert comm.all_reduce(x).tolist() == [2 + 4j]
        with pytest.raises(tcomm.TcommError):
            comm.all_reduce(x, "max")
        return comm.all_reduce(x).tolist()


def test_what_torch_refuses_by_value_is_an_error_of_ours_too(on_ranks):
    assert on_ranks(2, _complex) == [[2 + 4j]] * 2


def _late(member):
    fallback = _fallback(member)
    x = torch.full((4,), float(member.rank))
    for first in range(2):
        # Later than a slice of the wait, by far; then the other way round.
        if member.rank == first:
            time.sleep(0.3)
            fallback.send(x, 1 - member.rank, 20.0)
        else:
            fallback.recv(x, 1 - member.rank, 20.0)
    return x.tolist()


def test_a_transfer_waits_for_a_late_peer(on_ranks):
    assert on_ranks(2, _late) == [[0.0] * 4, [0.0] * 4]


class _Ending:
    """A work that comes to its end, or fails, as a slice of its wait is over."""

    def __init__(self, error=None):
        self.error, self.waits = error, 0

    def wait(self, timeout):
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Timed out")
        if self.error is not None:
            raise self.error

    def is_completed(self):
        return True


def _ends_with_a_slice(member):
    fallback = _fallback(member)
    fallback.run("all_reduce", 20.0, _Ending)
    with pytest.raises(CommError, match="it broke"):
        fallback.run("all_reduce", 20.0, lambda: _Ending(RuntimeError("it broke")))


def test_what_ends_with_a_slice_of_the_wait_has_ended(on_ranks):
    on_ranks(1, _ends_with_a_slice)


def _silent(member):
    fallback = _fallback(member)
    x = torch.ones(3)
    if member.rank == 1:
        member.meet("done")
        return None
    started = time.monotonic()
    with pytest.raises(PeerTimeoutError) as caught:
        _all_reduce(fallback, x, x, "sum", 0.5)
    seconds = time.monotonic() - started
    member.meet("done")
    return str(caught.value), seconds


def test_a_silent_peer_ends_in_our_timeout_after_the_callers_seconds(on_ranks):
    told, seconds = on_ranks(2, _silent)[0]
    assert told == "all_reduce of group 'tp' failed in torch.distributed: no answer for 0.5 s"
    assert 0.4 < seconds < 5


def _gone(member):
    fallback = _fallback(member)
    x = torch.ones(3)
    _all_reduce(fallback, x, x, "sum")
    if member.rank == 1:
        return None
    with pytest.raises(PeerLostError) as caught:
        _all_reduce(fallback, x, x, "sum")
    return str(caught.value)


def test_a_closed_connection_is_a_lost_peer(on_ranks):
    told = on_ranks(2, _gone)[0]
    assert told.startswith("all_reduce of group 'tp' failed in torch.distributed: ")
    assert "onnection" in told


class _NcclWork:
    """Of an operation on a stream: a wait with a timeout would block the host."""

    def __init__(self):
        self.waits = []

    def wait(self, *timeout):
        self.waits.append(timeout)
        return True


def _on_a_stream(member):
    member.process_group()
    comm = tcomm.Communicator(timeout=20.0)
    fallback, work = comm._fallback, _NcclWork()
    fallback.run("all_reduce", 5.0, lambda: work, True)
    fallback.run("all_reduce", 5.0, lambda: work)
    return [len(arguments) for arguments in work.waits]


def test_what_runs_on_a_stream_is_waited_for_by_the_stream(on_ranks):
    assert on_ranks(2, _on_a_stream) == [[0, 1]] * 2


def _says_where_it_runs(member):
    member.process_group()
    comm = tcomm.Communicator(timeout=20.0)
    told = []
    comm._fallback.run = lambda op, timeout, start, on_stream=False: told.append(on_stream)
    for algorithm in ("torch:nccl", "torch:gloo"):
        call = CallDescription("all_reduce", "float32", (3,), "sum", algorithm=algorithm)
        make_torch_plan(comm._fallback, call, None)(torch.ones(3), torch.ones(3), 1.0)
    return told


def test_only_nccl_runs_on_a_stream(on_ranks):
    assert on_ranks(1, _says_where_it_runs) == [[True, False]]

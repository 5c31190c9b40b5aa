"""Communicators on GPUs, over device memory that a fake made: CPU tensors pass for those of a GPU."""

import dataclasses
import os
import signal

import pytest
import torch

import tcomm
from tcomm.errors import CapabilityError, CollectiveMismatchError, ConfigError, GroupClosedError
from tcomm.groups import devices
from tcomm.groups.collective import Collective
from tcomm.groups.devices import DeviceMemory, Devices
from tcomm.kernels.bound import launches
from tcomm.memory.runtime import HostRuntime
from tcomm.topology import DeviceReport
from tests.faults.worlds import failure_of
from tests.kernels.test_all_reduce import use_tiles
from tests.memory.fake_symm_mem import FakeSymmetricMemory, LyingMemory, transport_of


def _as_if_on_gpus(member, memory=None, **kwargs):
    """A communicator whose tensors are all taken for a GPU's."""
    use_tiles(512)

    def describe(device, no_multicast, unreachable):
        return DeviceReport(
            name="NVIDIA H100 80GB HBM3",
            arch="sm_90",
            uuid=f"GPU-{member.rank}",
            host="here",
            link="nvlink4",
            link_gbps=450.0,
            num_sms=132,
            no_multicast=no_multicast,
            unreachable=unreachable,
        )

    def make_transport(device, members, config):
        return transport_of(member, memory, config.allow_shared_device)

    DeviceMemory.devices = Devices(make_transport, describe, lambda device, what: None)
    return take_tensors_for_a_gpus(member.communicator(**kwargs))


def take_tensors_for_a_gpus(comm):
    """`comm`, whose arena on a GPU lies on the CPU."""
    opened = []

    def open_on_cpu(device, *rest):
        opened.append(device)
        return DeviceMemory.open(comm._devices, torch.device("cpu"), *rest)

    comm._devices.open = open_on_cpu
    comm._open_device = lambda device, *rest: Collective._open_device(comm, torch.device("cuda", 0), *rest)
    comm._decide = lambda job, device, algorithm: Collective._decide(comm, job, "cuda", algorithm)
    comm.opened = opened
    return comm


def _verbs(member):
    with _as_if_on_gpus(member) as comm:
        assert comm._devices.arena is None
        for numel in (5, 3000):
            x = torch.arange(float(numel)) + comm.rank
            assert torch.equal(comm.all_reduce(x), 2 * torch.arange(float(numel)) + 1)
            assert comm.all_gather_single(x[:2].contiguous()).tolist() == [0.0, 1.0, 1.0, 2.0]
        parts = comm.reduce_scatter_single(torch.ones(6))
        assert parts.tolist() == [2.0] * 3
        comm.barrier()
        comm.synchronize()
        arena = comm._devices.arena
        assert len(comm.opened) == 1
        assert comm.capabilities.topology.kind == "h100"
        assert comm.capabilities.topology.no_multicast.endswith("this is a CPU")
        assert arena.channel.calls == 6
        assert sum(launches.values()) == 6
        decision = comm.explain("all_reduce", nbytes=1024, device="cuda")
        assert decision.algorithm.startswith("triton:")
        for name in ("one_shot_push", "two_shot"):
            assert comm.all_reduce(torch.ones(9), algorithm=name).tolist() == [2.0] * 9
    assert arena._is_closed
    for use in (lambda: comm.all_reduce(torch.ones(3)), comm.synchronize):
        with pytest.raises(GroupClosedError):
            use()


def test_the_first_collective_on_gpus_makes_the_memory_and_kernels_do_the_rest(on_ranks):
    on_ranks(2, _verbs)


def _by_switch(member):
    """Multimem has no form here; which launcher is called shows nevertheless."""
    from tcomm.kernels import multimem

    called = []
    for name in ("multimem_one_shot", "multimem_two_shot"):
        multimem.LAUNCHERS["all_reduce"][name] = lambda x, arena, op, out, **kw: called.append(kw["call"])
    for verb in ("all_gather", "reduce_scatter"):
        multimem.LAUNCHERS[verb]["multimem"] = lambda *args, call, **kw: called.append(call)
    memory = FakeSymmetricMemory(member.exchange("memory"), multicast=1 << 40)
    with _as_if_on_gpus(member, memory) as comm:
        comm.all_reduce(torch.ones(3), algorithm="multimem_two_shot")
        comm.all_gather_single(torch.ones(4), algorithm="triton:multimem")
        comm.reduce_scatter_single(torch.ones(4), algorithm="triton:multimem")
        assert comm.capabilities.topology.no_multicast == ""
        assert "torch's and not NVSHMEM's" in comm.capabilities.topology.no_nvshmem
    return [call.algorithm for call in called]


def test_where_there_is_multicast_the_switch_can_be_asked(on_ranks):
    wanted = ["triton:multimem_two_shot", "triton:multimem", "triton:multimem"]
    assert on_ranks(2, _by_switch) == [wanted] * 2


def _prepared(member):
    from tcomm.groups import communicator

    communicator._has_gpu = lambda: True
    torch.cuda.current_device = lambda: 0
    with _as_if_on_gpus(member) as comm:
        comm.prepare(1 << 22, [torch.float32])
        assert len(comm.opened) == 1
        staging = comm._devices.arena.staging
        assert staging.layout.slot_bytes >= 1 << 22
        calls = comm._devices.arena.channel.calls
        assert calls == 0
        comm.all_reduce(torch.ones(1 << 18), algorithm="one_shot_push")
        assert comm._devices.arena.channel.calls == 1
        assert comm._devices.arena.staging is staging
        comm.prepare(1 << 10, [torch.float32])
        assert comm._devices.arena.staging is staging
        assert comm.all_reduce(torch.ones(4)).tolist() == [2.0] * 4


def test_prepare_makes_memory_on_gpus_before_any_call_and_never_makes_it_smaller(on_ranks):
    on_ranks(2, _prepared)


def _mismatch(member):
    with _as_if_on_gpus(member) as comm:
        # The first calls differ: found by the agreement, before anything is made.
        with pytest.raises(CollectiveMismatchError, match="via first on GPUs"):
            comm.all_reduce(torch.ones(3 + comm.rank))
        assert comm._devices.arena is None
        assert comm.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
        with pytest.raises(CollectiveMismatchError, match="on GPUs: the ranks called different things"):
            comm.all_reduce(torch.ones(3 + comm.rank), algorithm="two_shot")
        assert comm.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
        comm.barrier()


def test_a_mismatch_before_and_after_the_memory_is_made(on_ranks):
    on_ranks(2, _mismatch)


def _no_memory(member, options):
    memory = FakeSymmetricMemory(member.exchange("memory"), **(options if member.rank == 1 else {}))
    with _as_if_on_gpus(member, memory) as comm:
        return [failure_of(comm.all_reduce, torch.ones(3)) for _ in range(2)]


def test_a_rank_without_room_is_the_same_error_everywhere(on_ranks):
    told = on_ranks(2, _no_memory, {"too_large": 4096})
    texts = {(failure.kind, failure.text) for failures in told for failure in failures}
    assert len(texts) == 1
    ((kind, text),) = texts
    assert kind == "CapabilityError"
    assert "rank 1: CUDA driver error: out of memory: needed" in text


def test_what_torch_lacks_on_one_rank_is_the_reason_on_all(on_ranks):
    told = on_ranks(2, _no_memory, {"reason": "this torch is built without CUDA"})
    texts = {(failure.kind, failure.text) for failures in told for failure in failures}
    assert len(texts) == 1
    ((kind, text),) = texts
    assert kind == "CapabilityError"
    assert "rank 1: this torch is built without CUDA" in text


def _lying(member):
    kind = LyingMemory if member.rank == 0 else FakeSymmetricMemory
    memory = kind(member.exchange("memory"), **({"about": [1]} if member.rank == 0 else {}))
    with _as_if_on_gpus(member, memory) as comm:
        return failure_of(comm.all_reduce, torch.ones(3)).text


def test_kernels_are_refused_where_peer_access_was_found_broken(on_ranks):
    told = on_ranks(2, _lying)
    assert told[0] == told[1]
    assert "rank 0 cannot write to rank 1: writing: 4 of 4 words" in told[0]


def _killed(member):
    with _as_if_on_gpus(member) as comm:
        comm.all_reduce(torch.ones(3))
        member.meet("one")
        if member.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return failure_of(comm.all_reduce, torch.ones(3), timeout=None)


def test_a_killed_rank_ends_a_communicators_call(on_ranks):
    outcomes = on_ranks(2, _killed, check=False)
    lost = outcomes[0].value
    assert lost is not None, outcomes[0].error
    assert (lost.kind, lost.peers) == ("PeerLostError", (1,))
    assert lost.seconds < 2.0


def _other_device(member):
    with _as_if_on_gpus(member) as comm:
        comm.all_reduce(torch.ones(3))
        comm._devices.arena.device = torch.device("cuda", 1)
        with pytest.raises(
            ConfigError, match="a tensor on cpu: this rank's memory in group 'test' is on cuda:1"
        ):
            comm.all_reduce(torch.ones(3))
        comm._devices.arena.device = torch.device("cpu")


def test_a_tensor_on_another_device_is_refused(on_ranks):
    on_ranks(2, _other_device)


def test_a_capture_refuses_to_make_memory(monkeypatch):
    def refuse(device, what):
        raise CapabilityError(f"{what}, call prepare()")

    memory = DeviceMemory.__new__(DeviceMemory)
    memory.topology = None
    memory.devices = dataclasses.replace(devices.REAL_DEVICES, refuse_in_capture=refuse)
    with pytest.raises(CapabilityError, match="the memory of the group on GPUs has to be made"):
        memory.open(torch.device("cuda", 0), None, None, 1.0)


def test_a_group_of_one_needs_no_memory_on_gpus():
    with tcomm.Communicator() as comm:
        comm._open_device(torch.device("cuda", 0), None, 1.0)
        assert comm.capabilities.topology is None


def test_the_host_runtime_never_captures():
    assert HostRuntime().capture_id(0) == 0


def _variables_differ(member):
    if member.rank == 1:
        os.environ["TCOMM_ALLOW_SHARED_DEVICE"] = "1"
    return failure_of(member.communicator).text


def test_variables_of_gpus_are_compared(on_ranks):
    assert all("TCOMM_ALLOW_SHARED_DEVICE" in text for text in on_ranks(2, _variables_differ))


def _coalesced_first(member):
    with _as_if_on_gpus(member) as comm:
        assert comm.capabilities.topology is None
        with comm.coalescing() as batch:
            total = batch.all_reduce(torch.ones(5))
        assert total.tolist() == [2.0] * 5
        assert comm.capabilities.topology is not None


def test_the_first_call_of_a_group_on_gpus_may_be_coalesced(on_ranks):
    on_ranks(2, _coalesced_first)

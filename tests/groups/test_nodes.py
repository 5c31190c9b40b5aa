"""Communicators whose ranks say that they are on several hosts, over an NVSHMEM of shared memory."""

import logging
import os
import time

import pytest
import torch
import torch.distributed as dist

import tcomm
from tcomm.config import Config
from tcomm.errors import CapabilityError, CollectiveMismatchError, GroupClosedError
from tcomm.groups import devices, handle
from tcomm.groups.devices import DeviceMemory, Devices
from tcomm.groups.setup import from_store, split_exchange
from tcomm.kernels import nodes
from tcomm.kernels.bound import launches
from tcomm.memory import nvshmem
from tcomm.memory.base import NotShared
from tcomm.memory.nvshmem import NvshmemTransport
from tcomm.topology import DeviceReport
from tests.faults.worlds import failure_of
from tests.groups.test_devices import take_tensors_for_a_gpus
from tests.kernels.test_all_reduce import use_tiles
from tests.kernels.test_hierarchical import reduced
from tests.memory.fake_nvshmem import FakeNvshmem, install
from tests.test_reference import every_ranks_input

HOSTS = "AABB"
"""Host of each rank."""


@pytest.fixture
def home(tmp_path):
    return install(tmp_path / "nvshmem")


def _on_hosts(member, home, hosts=HOSTS, *, missing=(), room=1 << 30, timeout=20.0):
    """A communicator over gloo, and this rank's NVSHMEM."""
    use_tiles(512)
    mates = {rank for rank, host in enumerate(hosts) if host == hosts[member.rank]}
    fake = FakeNvshmem(member.exchange("fake"), mates, pe=member.rank + 3, room=room)

    def describe(device, no_multicast, unreachable):
        return DeviceReport(
            name="NVIDIA H100 80GB HBM3", arch="sm_90", uuid=f"GPU-{member.rank}", link="nvlink4",
            link_gbps=450.0, nic_gbps=50.0, num_sms=132, no_multicast=no_multicast, unreachable=unreachable,
        )  # fmt: skip

    def load(device):
        if member.rank in missing:
            return nvshmem.load_nvshmem(device)
        return fake.library(device)

    def start(device, members, config, seconds):
        exchange = split_exchange(members, "nvshmem")
        return NvshmemTransport.start(exchange, 0, seconds, load=load, home=home)

    DeviceMemory.devices = Devices(None, describe, lambda *_: None, lambda: hosts[member.rank], start)
    handle.open_arena = lambda *_: NotShared("the ranks are on several hosts")
    nodes.Heap = fake.heap
    member.process_group()
    comm = tcomm.Communicator(name="test", timeout=timeout)
    return take_tensors_for_a_gpus(comm), fake


def _right_bits(member, home, hosts):
    comm, fake = _on_hosts(member, home, hosts)
    world, num_nodes, found = member.world_size, len(set(hosts)), []
    with comm:
        for seed, (op, dtype) in enumerate([("sum", torch.float32), ("avg", torch.bfloat16)]):
            for numel in (0, 1, 3000):
                inputs = every_ranks_input(seed, world, (numel,), dtype, special=False)
                out = comm.all_reduce(inputs[comm.rank], op, algorithm="hierarchical")
                found.append(torch.equal(out, reduced(inputs, num_nodes, op)))
                out = comm.all_gather_single(inputs[comm.rank], algorithm="triton:hierarchical")
                found.append(torch.equal(out, torch.cat(inputs)))
        rows = comm.all_gather_single(torch.full((2, 3), float(comm.rank)), dim=1, algorithm="hierarchical")
        assert rows[1].tolist() == [float(rank) for rank in range(world) for _ in range(3)]
        topology = comm.capabilities.topology
        assert topology.nodes == tuple(sorted(hosts).index(host) * num_nodes // world for host in hosts)
        assert (topology.no_nvshmem, topology.no_peer_access) == ("", "")
        assert comm._devices.arena.channel.calls == len(found) + 1 == launches.total()
        decision = comm.explain("all_reduce", nbytes=4096, device="cuda", algorithm="hierarchical")
        assert decision.algorithm == "triton:hierarchical"
        refused = dict(comm.explain("all_reduce", nbytes=4096, device="cuda").rejected)
        assert "one node, and the ranks are on" in refused["triton:two_shot"]
        assert fake.log[0] == f"init device 0 {comm.rank}/{world}"
        comm.synchronize()
    comm.close()
    assert fake.log[-1] == "finalize"
    assert not fake.running
    with pytest.raises(GroupClosedError):
        comm.all_reduce(torch.ones(3))
    return all(found)


@pytest.mark.parametrize("hosts", ["AABB", "AB", "ABC"])
def test_hierarchical_has_the_documented_bits_over_hosts(on_ranks, home, hosts):
    assert on_ranks(len(hosts), _right_bits, home, hosts) == [True] * len(hosts)


def _one_lacks_it(member, home):
    comm, fake = _on_hosts(member, home, missing=[3])
    with comm:
        assert comm.all_reduce(torch.ones(3)).tolist() == [4.0] * 3
        assert comm.all_gather_single(torch.tensor([comm.rank])).tolist() == [0, 1, 2, 3]
        decision = comm.explain("all_reduce", nbytes=12, device="cuda")
        told = failure_of(comm.all_reduce, torch.ones(3), algorithm="hierarchical").text
        topology = comm.capabilities.topology
        assert comm._devices.arena is None
    assert fake.log == []
    return decision.algorithm, decision.reason, topology.no_nvshmem, topology.nodes, told


def test_where_one_rank_lacks_nvshmem_all_fall_back_and_say_why(on_ranks, home):
    outcomes = on_ranks(4, _one_lacks_it, home)
    assert len(set(outcomes)) == 1
    algorithm, reason, no_nvshmem, placed, told = outcomes[0]
    assert (algorithm, placed) == ("torch:gloo", (0, 0, 1, 1))
    for text in (reason, no_nvshmem, told):
        assert "NVSHMEM cannot be used; rank 3: nvshmem4py cannot be used" in text
        assert "run `pip install tcomm[nvshmem]`" in text
    assert "rank 0: nvshmem4py" not in reason


def _no_room(member, home):
    comm, fake = _on_hosts(member, home, room=1000)
    with comm:
        told = [failure_of(comm.all_reduce, torch.ones(3), algorithm="hierarchical") for _ in range(2)]
    assert fake.log[-1] == "finalize"
    return {(failure.kind, failure.text) for failure in told}


def test_a_heap_without_room_is_the_same_error_everywhere_and_every_time(on_ranks, home):
    ((kind, text),) = set.union(*on_ranks(4, _no_room, home))
    assert kind == "CapabilityError"
    assert "in NVSHMEM's heap on ranks [0, 1, 2, 3]; set NVSHMEM_SYMMETRIC_SIZE higher" in text


def _out_of_order(member, home):
    comm, _ = _on_hosts(member, home, "ABAB")
    with comm:
        assert comm.all_reduce(torch.ones(3)).tolist() == [4.0] * 3
        return failure_of(comm.all_reduce, torch.ones(3), algorithm="hierarchical").text


def test_nodes_whose_ranks_do_not_follow_one_another_are_refused(on_ranks, home):
    (told,) = set(on_ranks(4, _out_of_order, home))
    assert "it needs the ranks of a node one after another, and the ranks are on nodes (0, 1, 0, 1)" in told


def _one_way(member, home):
    comm, fake = _on_hosts(member, home)
    if member.rank == 0:
        fake.near = {0}
    with comm:
        assert comm.all_reduce(torch.ones(3)).tolist() == [4.0] * 3
        return failure_of(comm.all_reduce, torch.ones(3), algorithm="hierarchical").text


def test_a_mate_that_cannot_be_reached_is_no_other_node(on_ranks, home):
    (told,) = set(on_ranks(4, _one_way, home))
    assert "rank 0 cannot write to rank 1: loads and stores from rank 0 do not reach rank 1" in told


def _mismatch(member, home):
    comm, _ = _on_hosts(member, home)
    with comm:
        with pytest.raises(CollectiveMismatchError, match="via first on GPUs"):
            comm.all_reduce(torch.ones(3 + comm.rank), algorithm="hierarchical")
        assert comm._devices.arena is None
        assert comm.all_reduce(torch.ones(3), algorithm="hierarchical").tolist() == [4.0] * 3
        x = torch.ones(500 if comm.rank == 3 else 7)
        with pytest.raises(CollectiveMismatchError) as caught:
            comm.all_reduce(x, algorithm="hierarchical")
        assert comm.all_reduce(torch.ones(3), algorithm="hierarchical").tolist() == [4.0] * 3
        return str(caught.value), caught.value.peers


def test_ranks_that_call_different_things_all_hear_of_it_and_go_on(on_ranks, home):
    for rank, (told, peers) in enumerate(on_ranks(4, _mismatch, home)):
        assert f"  rank {rank}: all_reduce float32 [{500 if rank == 3 else 7}] sum" in told
        if rank != 3:
            # Ranks 1 and 2 meet rank 3 themselves; rank 0 hears of it by one of them.
            assert peers in ((), (3,)), (rank, told)
            assert "heard of it from another rank" in told or "  rank 3: a call of signature" in told


def _never_comes(member, home):
    comm, _ = _on_hosts(member, home, timeout=0.7)
    with comm:
        comm.all_reduce(torch.ones(3), algorithm="hierarchical", timeout=20.0)
        found = []
        if member.rank != 3:
            found = [failure_of(comm.all_reduce, torch.ones(3), algorithm="hierarchical") for _ in range(2)]
            assert found[1].seconds < 0.3
        member.meet("over")
    return [(failure.kind, failure.peers, failure.seconds) for failure in found]


def test_a_rank_that_never_comes_is_a_timeout_at_the_deadline_of_the_device(on_ranks, home):
    outcomes = on_ranks(4, _never_comes, home)
    for (kind, peers, seconds), again in outcomes[:3]:
        assert kind == again[0] == "PeerTimeoutError"
        assert peers == again[1]
        assert seconds < 3
    assert any(peers == (3,) for (_, peers, _), _ in outcomes[:3])


def _closes_alone(member, home):
    nvshmem._OTHERS_SECONDS = 0.4
    comm, fake = _on_hosts(member, home)
    comm.all_reduce(torch.ones(3), algorithm="hierarchical")
    told = []
    logging.getLogger("tcomm").addFilter(lambda record: told.append(record.getMessage()) or True)
    if member.rank == 2:
        member.meet("the others gave up")
    began = time.monotonic()
    comm.close()
    comm.close()
    seconds = time.monotonic() - began
    if member.rank != 2:
        member.meet("the others gave up")
    return seconds, [entry for entry in fake.log if "free" in entry or entry == "finalize"], told


def test_whoever_closes_while_another_does_not_frees_nothing_and_nobody_hangs(on_ranks, home):
    for seconds, freed, told in on_ranks(4, _closes_alone, home):
        assert seconds < 3
        assert freed == []
        assert any("memory of NVSHMEM stays until the process ends" in line for line in told)


def _grows(member, home, hosts):
    from tcomm.groups import communicator

    communicator._has_gpu = lambda: True
    torch.cuda.current_device = lambda: 0
    os.environ["TCOMM_STAGING_BYTES"] = str(1 << 19)
    comm, fake = _on_hosts(member, home, hosts)
    world = len(hosts)
    with comm:
        x = torch.arange(3.0)
        first = comm.all_reduce(x, algorithm="hierarchical")
        small = comm._devices.arena.staging
        comm.prepare(1 << 19, [torch.float32])
        large = comm._devices.arena.staging
        assert large.layout.nbytes > small.layout.nbytes
        before = comm._devices.arena.channel.calls
        use_tiles(65536)
        total = comm.all_reduce(torch.ones(1 << 18, dtype=torch.bfloat16), algorithm="hierarchical")
        assert comm._devices.arena.channel.calls == before + 1
        assert bool((total == world).all())
        assert torch.equal(first, world * x)
        assert torch.equal(comm.all_gather_single(x, algorithm="hierarchical"), x.repeat(world))
        # Graphs hold the addresses of what was there before.
        assert int(small.buffer.table[comm.rank]) == small.buffer.local.data_ptr()
    sizes = [entry for entry in fake.log if entry.startswith(("malloc", "free"))]
    assert [entry.split()[0] for entry in sizes] == ["malloc", "malloc", "free", "free"]


@pytest.mark.parametrize("hosts", ["AABB", "AB"])
def test_prepare_makes_room_for_a_message_in_one_piece_and_keeps_the_old(on_ranks, home, hosts):
    on_ranks(len(hosts), _grows, home, hosts)


def _two_groups(member, home):
    comm, fake = _on_hosts(member, home)
    other = take_tensors_for_a_gpus(comm.split())
    for each in (comm, other):
        assert each.all_reduce(torch.ones(3), algorithm="hierarchical").tolist() == [4.0] * 3
    comm.close()
    assert fake.running
    assert other.all_reduce(torch.ones(3), algorithm="hierarchical").tolist() == [4.0] * 3
    other.close()
    return fake.running, fake.log.count("finalize"), sum(entry.startswith("free") for entry in fake.log)


def test_nvshmem_ends_with_the_last_group_that_uses_it(on_ranks, home):
    assert on_ranks(4, _two_groups, home) == [(False, 1, 2)] * 4


def _one_host(member, home):
    comm, _ = _on_hosts(member, home, "AA")
    memory = []
    DeviceMemory.devices = Devices(
        lambda *_: memory.append(1) or pytest.fail("made"), None, lambda *_: None, lambda: "A", None
    )
    with comm, pytest.raises(BaseException, match="made"):
        comm.all_reduce(torch.ones(3))
    return memory


def test_on_one_host_the_memory_is_torchs(on_ranks, home):
    assert on_ranks(2, _one_host, home) == [[1]] * 2


def test_the_real_start_has_an_exchange_of_its_own_each_time_and_the_directory(monkeypatch):
    started = []

    def start(exchange, device, seconds, **options):
        started.append((exchange.prefix, device, seconds, options))

    monkeypatch.setattr(NvshmemTransport, "start", start)
    members = from_store(dist.HashStore(), 0, 1, "tp")
    for _ in range(2):
        devices.REAL_DEVICES.start_nvshmem(torch.device("cuda", 3), members, Config(nvshmem_home="/n"), 9.0)
    (first, *rest), (second, *again) = started
    assert rest == again == [3, 9.0, {"home": "/n", "problem": ""}]
    assert first != second
    assert "tp/1/nvshmem" in first
    assert members.exchange.prefix not in (first, second)


def test_without_a_way_to_start_it_nvshmem_is_missing():
    memory = DeviceMemory.__new__(DeviceMemory)
    memory.devices = Devices(None, None, None)
    made, why = memory._open_transport(torch.device("cpu"), ["A", "B"])
    assert (made, why) == (None, "NVSHMEM cannot be started")


def test_nvshmem_is_not_started_for_more_ranks_than_a_page_has_room_for():
    memory = DeviceMemory.__new__(DeviceMemory)
    memory.devices = Devices(None, None, None, None, lambda *_: pytest.fail("started"))
    made, why = memory._open_transport(torch.device("cpu"), ["A"] * 9 + ["B"] * 8)
    assert (made, why) == (None, "17 ranks are more than the 16 that a control page has room for")


def test_a_triton_that_cannot_read_the_bitcode_is_a_reason(monkeypatch):
    from tcomm.kernels import nvshmem_modules

    assert nvshmem_modules.why_not_linked("3.6.0") == ""
    monkeypatch.setattr(nvshmem_modules, "is_interpreted", lambda: False)
    assert nvshmem_modules.why_not_linked("3.7.1") == ""
    assert "LLVM of Triton 3.6.0 cannot read NVSHMEM's bitcode; install Triton 3.7" in (
        nvshmem_modules.why_not_linked("3.6.0")
    )


def _cannot_link(member, home):
    fake = FakeNvshmem(member.exchange("fake"))
    problem = "the LLVM of Triton 3.6.0 is old" if member.rank else ""
    with pytest.raises(CapabilityError) as caught:
        NvshmemTransport.start(
            member.exchange("group"), 0, 20.0, load=fake.library, home=home, problem=problem
        )
    return str(caught.value)


def test_what_one_rank_knows_to_be_in_the_way_is_told_to_all(on_ranks, home):
    told = "NVSHMEM cannot be used; rank 1: the LLVM of Triton 3.6.0 is old"
    assert on_ranks(2, _cannot_link, home) == [told] * 2

import gc
import pathlib
import sys

import pytest
import torch

from tcomm.errors import CapabilityError, GroupClosedError, RendezvousError
from tcomm.memory.nvshmem import NvshmemTransport, load_nvshmem
from tests.memory.fake_nvshmem import FakeNvshmem, install


def start(member, fake, home, timeout=20.0):
    return NvshmemTransport.start(member.exchange("group"), 3, timeout, load=fake.library, home=home)


def _life(member, home):
    fake = FakeNvshmem(member.exchange("fake"))
    transport = start(member, fake, home)
    small, large = transport.allocate(64, 20.0), transport.allocate(4096, 20.0)
    zeroed = int(large.local.sum())
    small.local.fill_(member.rank + 1)
    member.meet("filled")
    seen = [int(small.peer(peer)[0]) for peer in range(member.world_size)]
    last = small.peer(0, (2, 3), torch.int32, offset=40).shape
    member.meet("seen")
    told = (transport.owned, transport.pes, zeroed, seen, tuple(last), len(small.table))
    transport.close(20.0)
    transport.close(20.0)
    return told, fake.log, fake.running


def test_a_life_ends_in_the_right_order(on_ranks, tmp_path):
    home = install(tmp_path / "nvshmem")
    for rank, (told, log, running) in enumerate(on_ranks(3, _life, home)):
        assert told == (True, (0, 1, 2), 0, [1, 2, 3], (2, 3), 3)
        assert log == [
            f"init device 3 {rank}/3", "malloc 64", "sync", "malloc 4096", "sync",
            "sync", "free 4096", "free 64", "finalize",
        ]  # fmt: skip
        assert not running


def _attached(member, home):
    fake = FakeNvshmem(member.exchange("fake"), running=True, pe=5 - member.rank)
    fake.near = {member.rank}
    transport = start(member, fake, home)
    transport.allocate(64, 20.0)
    order = []
    transport.on_close(lambda: order.append(list(fake.log)))
    transport.close(20.0)
    return transport.owned, transport.pes, fake.log, order == [fake.log], fake.running


def test_an_nvshmem_that_runs_is_used_and_left_running(on_ranks, tmp_path):
    home = install(tmp_path / "nvshmem")
    wanted = (False, (5, 4), ["malloc 64", "sync", "sync", "free 64"], True, True)
    assert on_ranks(2, _attached, home) == [wanted] * 2


def _two_nodes(member, home):
    fake = FakeNvshmem(member.exchange("fake"), near={member.rank // 2 * 2, member.rank // 2 * 2 + 1})
    buffer = start(member, fake, home).allocate(256, 20.0)
    far = (member.rank + 2) % 4
    with pytest.raises(CapabilityError) as caught:
        buffer.peer(far)
    return [address != 0 for address in buffer.table.tolist()], str(caught.value), sorted(buffer.unreachable)


def test_ranks_of_other_nodes_have_no_view_and_the_reason_is_told(on_ranks, tmp_path):
    for rank, (reached, told, unreachable) in enumerate(
        on_ranks(4, _two_nodes, install(tmp_path / "nvshmem"))
    ):
        mates = [r for r in range(4) if r // 2 == rank // 2]
        assert reached == [r in mates for r in range(4)]
        assert unreachable == [r for r in range(4) if r not in mates]
        assert told == (
            f"loads and stores from rank {rank} do not reach rank {(rank + 2) % 4}: it is on another node, "
            "or its GPU is no peer of this one; use puts and gets"
        )


def _parts(member, home):
    fake = FakeNvshmem(member.exchange("fake"), near={member.rank})
    transport = start(member, fake, home)
    whole = transport.allocate(4096, 20.0)
    part = whole.part(1024, 512)
    address, far = part.local.data_ptr(), 1 - member.rank
    assert (part.nbytes, part.address, part.multicast) == (512, whole.address + 1024, 0)
    assert address == part.table[member.rank] == whole.local.data_ptr() + 1024
    assert (int(part.table[far]), sorted(part.unreachable)) == (0, [far])
    transport.close(20.0)
    assert part.table.tolist() == [0, 0]
    with pytest.raises(GroupClosedError):
        part.peer(member.rank)
    return [entry for entry in fake.log if entry.startswith("free")]


def test_a_part_of_a_buffer_is_at_the_same_offset_everywhere_and_ends_with_it(on_ranks, tmp_path):
    assert on_ranks(2, _parts, install(tmp_path / "nvshmem")) == [["free 4096"]] * 2


def _after_close(member, home):
    fake = FakeNvshmem(member.exchange("fake"))
    transport = start(member, fake, home)
    buffer = transport.allocate(64, 20.0)
    transport.close(20.0)
    found = []
    for use in (
        lambda: transport.allocate(64, 20.0),
        lambda: transport.on_close(print),
        lambda: buffer.local,
        lambda: buffer.peer(0),
    ):
        with pytest.raises(GroupClosedError) as caught:
            use()
        found.append(str(caught.value))
    return found, buffer.table.tolist()


def test_nothing_can_be_used_after_close(on_ranks, tmp_path):
    closed, freed = (
        "the NVSHMEM transport is closed; start another",
        "the memory of NVSHMEM was freed when its transport was closed",
    )
    assert on_ranks(1, _after_close, install(tmp_path / "nvshmem")) == [([closed, closed, freed, freed], [0])]


def _dropped(member, home):
    fake = FakeNvshmem(member.exchange("fake"))
    transport = start(member, fake, home)
    transport.allocate(64, 20.0)
    del transport
    gc.collect()
    return fake.log[-1]


def test_the_garbage_collector_frees_nothing(on_ranks, tmp_path):
    assert on_ranks(1, _dropped, install(tmp_path / "nvshmem")) == ["sync"]


def _close_alone(member, home):
    fake = FakeNvshmem(member.exchange("fake"))
    transport = start(member, fake, home)
    transport.allocate(64, 20.0)
    if member.rank:
        member.meet("rank 0 has raised")
        return fake.log[-1]
    with pytest.raises(RendezvousError, match=r"ranks \[1\] of 2 did not come"):
        transport.close(0.3)
    member.meet("rank 0 has raised")
    return fake.log[-2:]


def test_a_rank_that_closes_alone_is_told_and_frees_nothing(on_ranks, tmp_path):
    assert on_ranks(2, _close_alone, install(tmp_path / "nvshmem")) == [["sync", "sync"], "sync"]


def _refused(member, home, by_rank, wanted=""):
    kwargs = by_rank.get(member.rank, {})
    fake = FakeNvshmem(member.exchange("fake"), **kwargs)
    with pytest.raises(CapabilityError) as caught:
        start(member, fake, home)
    assert not [entry for entry in fake.log if entry.startswith("init")]
    return str(caught.value)


REFUSALS = [
    (
        {1: {"version": "3.4.5"}},
        "NVSHMEM cannot be used; rank 1: the host library of NVSHMEM is 3.4.5 and the bitcode ",
    ),
    (
        {0: {"running": True}},
        "NVSHMEM runs on ranks [0] and not on the others; start it on all ranks before, or on",
    ),
    (
        {r: {"running": True, "n_pes": 4} for r in (0, 1)},
        "NVSHMEM runs with [4] PEs, and the 2 ranks of this group are PEs [0, 1]; its memory",
    ),
]


@pytest.mark.parametrize(("by_rank", "told"), REFUSALS, ids=["version", "one runs", "subset"])
def test_what_cannot_work_is_refused_on_every_rank_with_the_same_words(on_ranks, tmp_path, by_rank, told):
    first, second = on_ranks(2, _refused, install(tmp_path / "nvshmem"), by_rank)
    assert first == second
    assert first.startswith(told)


def _broken_start(member, home, broken):
    fake = FakeNvshmem(member.exchange("fake"))
    fake.init_error = "no interface" if broken == "init" else ""
    load = fake.library
    if broken == "load" and member.rank:

        def load(device):
            raise OSError("libnvshmem_host.so.3: cannot open")

    with pytest.raises(CapabilityError) as caught:
        NvshmemTransport.start(member.exchange("group"), 0, 20.0, load=load, home=home)
    return str(caught.value)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (
            "init",
            "NVSHMEM did not start; rank 0: RuntimeError: no interface; rank 1: RuntimeError: no interface; ",
        ),
        ("load", "NVSHMEM cannot be used; rank 1: OSError: libnvshmem_host.so.3: cannot open"),
    ],
)
def test_what_raises_on_some_ranks_is_an_error_on_all(on_ranks, tmp_path, broken, told):
    first, second = on_ranks(2, _broken_start, install(tmp_path / "nvshmem"), broken)
    assert first == second
    assert first.startswith(told)


def _different_homes(member, homes):
    fake = FakeNvshmem(member.exchange("fake"), version=["3.8.0", "3.7.2"][member.rank])
    with pytest.raises(CapabilityError) as caught:
        start(member, fake, homes[member.rank])
    return str(caught.value)


def test_ranks_with_different_versions_are_refused(on_ranks, tmp_path):
    homes = [install(tmp_path / version, version) for version in ("3.8.0", "3.7.2")]
    told = "the ranks have different versions of NVSHMEM (rank 0 has 3.8.0, rank 1 has 3.7.2); install one"
    assert on_ranks(2, _different_homes, homes) == [told] * 2


def _bad_sizes(member, home):
    fake = FakeNvshmem(member.exchange("fake"), room=1000 if member.rank else 1 << 20)
    transport, found = start(member, fake, home), []
    for nbytes in (64 + 64 * member.rank, 1 << 21):
        with pytest.raises(CapabilityError) as caught:
            transport.allocate(nbytes, 20.0)
        found.append(str(caught.value))
    return found


def test_sizes_that_differ_or_do_not_fit_are_refused_on_every_rank(on_ranks, tmp_path):
    told = [
        "the ranks ask for [64, 128] bytes of NVSHMEM memory; give the same size on all",
        "no 2097152 bytes in NVSHMEM's heap on ranks [0, 1]; set NVSHMEM_SYMMETRIC_SIZE higher",
    ]
    assert on_ranks(2, _bad_sizes, install(tmp_path / "nvshmem")) == [told] * 2


def test_without_nvshmem4py_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvshmem", None)
    with pytest.raises(CapabilityError) as caught:
        load_nvshmem(0)
    assert "run `pip install tcomm[nvshmem]`" in str(caught.value)
    assert "nvshmem4py cannot be used" in str(caught.value)


def test_nothing_is_freed_by_a_destructor_or_at_exit():
    source = pathlib.Path(sys.modules[NvshmemTransport.__module__].__file__).read_text()
    assert "__del__" not in source
    assert "atexit" not in source
    assert "weakref" not in source

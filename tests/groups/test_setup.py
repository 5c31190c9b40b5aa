import datetime
import logging
import os
import time

import pytest
import torch
import torch.distributed as dist

import tcomm
from tcomm.config import Config
from tcomm.errors import CapabilityError, ConfigError, DuplicateRankError
from tcomm.groups import handle, setup
from tcomm.groups.setup import agree_on_settings, from_process_group, from_store
from tcomm.groups.stateless.gloo import init_gloo_process_group
from tcomm.tuning.table import Row, Table


def _table(*rows):
    return Table(1, "test", "", "", "", rows)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0), (5, 3)])
def test_a_rank_outside_of_the_world_is_refused(rank, world_size):
    with pytest.raises(ConfigError) as caught:
        from_store(dist.HashStore(), rank, world_size, "tp")
    assert str(caught.value) == (
        f"rank {rank} of {world_size} ranks: it must be at least 0 and below their number"
    )


def test_groups_of_one_name_on_one_store_get_keys_of_their_own():
    store = dist.HashStore()
    first, second = (from_store(store, 0, 2, "twice") for _ in range(2))
    assert first.exchange._key(0, 0) != second.exchange._key(0, 0)
    assert (first.global_ranks, first.process_group) == ((0, 1), None)


def test_without_a_process_group_a_process_is_alone():
    members = from_process_group(None, "")
    assert (members.name, members.global_ranks, members.exchange.world_size) == ("alone", (0,), 1)


@pytest.mark.parametrize("thing", ["world", 3, object])
def test_what_is_no_group_is_refused(thing):
    with pytest.raises(ConfigError) as caught:
        from_process_group(thing, "")
    assert str(caught.value) == f"{thing!r} is no process group that this rank belongs to, and no DeviceMesh"


def _subgroups(member):
    member.process_group()
    odd = dist.new_group([1], group_desc="odd ones")
    outer = dist.new_group([0, 2], group_desc="outer")
    if member.rank == 1:
        with pytest.raises(ConfigError, match="is no process group that this rank belongs to"):
            tcomm.Communicator(outer)
        with tcomm.Communicator(odd) as comm:
            return comm.name, comm.rank, comm.world_size, comm.global_ranks
    with tcomm.Communicator(outer) as comm, tcomm.Communicator(outer, name="again") as again:
        total = comm.all_reduce(again.all_reduce(torch.ones(3) * member.rank))
        assert again.name == "again"
        assert total.tolist() == [4.0] * 3
        return comm.name, comm.rank, comm.world_size, comm.global_ranks


def test_subgroups_have_ranks_and_a_name_of_their_own(on_ranks):
    assert on_ranks(3, _subgroups) == [
        ("outer", 0, 2, (0, 2)),
        ("odd ones", 0, 1, (1,)),
        ("outer", 1, 2, (0, 2)),
    ]


def _table_of_rank_zero(member, directory):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("tcomm").addHandler(handler)
    if member.rank == 0:
        path = f"{directory}/table.json"
        row = Row("all_reduce", "cpu:two_shot", None, piece_nbytes=4096, measured_us={"cpu:two_shot": 3.0})
        with open(path, "wb") as file:
            file.write(_table(row).encode())
        os.environ["TCOMM_TABLE"] = path
    with member.communicator() as comm:
        decision = comm.explain("all_reduce", nbytes=12)
        assert comm.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
    return decision, messages


def test_the_table_of_rank_zero_counts_for_all(on_ranks, tmp_path):
    (first, quiet), (second, warned) = on_ranks(2, _table_of_rank_zero, str(tmp_path))
    assert first == second
    assert (first.algorithm, first.piece_nbytes) == ("cpu:two_shot", 4096)
    assert first.measured_us == (("cpu:two_shot", 3.0),)
    assert quiet == []
    assert warned == ["group 'test': using the tuning table of rank 0, which differs from mine"]


def _bad_table(member, directory):
    if member.rank == 0:
        os.environ["TCOMM_TABLE"] = f"{directory}/none.json"
    handle.SETUP_SECONDS = 0.5
    try:
        member.communicator()
    except tcomm.TcommError as error:
        return type(error).__name__, str(error)


def test_a_table_that_is_not_there_is_the_fault_of_its_rank(on_ranks, tmp_path):
    bad, other = on_ranks(2, _bad_table, str(tmp_path))
    assert bad[0] == "ConfigError"
    assert bad[1].startswith(f"tuning table '{tmp_path}/none.json' cannot be read: ")
    assert other[0] == "RendezvousError"
    assert other[1].startswith("ranks [0] of 2 did not come")


class _Announced:
    """A store that says when this process has put its claim to rank 1 down."""

    def __init__(self, store, announce):
        self._store = store
        self._announce = announce

    def __getattr__(self, name):
        return getattr(self._store, name)

    def set(self, key, value):
        self._store.set(key, value)
        if key == "tcomm/tp/1/0/1":
            self._announce()


def _same_rank_twice(member):
    """Processes 1 and 2 both claim rank 1; process 0 comes when both have."""
    store = _Announced(member.store, lambda: member.meet("claimed"))
    if member.rank == 0:
        member.meet("claimed")
    try:
        with tcomm.Communicator.from_store(store, min(member.rank, 1), 2, name="tp") as comm:
            return comm.all_reduce(torch.ones(1)).item()
    except DuplicateRankError as error:
        return str(error)


def test_of_two_processes_that_claim_one_rank_one_is_told_so(on_ranks):
    results = on_ranks(3, _same_rank_twice)
    assert results[0] == 2.0
    assert set(results[1:]) == {
        2.0,
        "another process also claims rank 1 of group 'tp'; give each its own rank",
    }


def _cores_and_kernels(member):
    if member.rank == 1:
        os.environ["TRITON_INTERPRET"] = "0"
    members = from_store(member.store, member.rank, member.world_size, "tp")
    settled = agree_on_settings(members, Config(), 20.0)
    return settled.no_kernels, settled.num_cores, settled.table.format


def test_one_rank_without_kernels_is_enough_for_the_group_to_have_none(on_ranks):
    cores = len(os.sched_getaffinity(0))
    told = "rank 1: TRITON_INTERPRET=0 turns the interpreter off"
    assert on_ranks(3, _cores_and_kernels) == [(told, cores, 1)] * 3


def _another_torch(member):
    if member.rank == 1:
        setup.torch.__version__ = "1.0"
    members = from_store(member.store, member.rank, member.world_size, "tp")
    with pytest.raises(tcomm.GroupMismatchError) as caught:
        agree_on_settings(members, Config(), 20.0)
    return str(caught.value)


def test_another_version_is_shown_with_each_ranks_value(on_ranks):
    expected = [
        "the ranks of group 'tp' have different settings",
        "  torch:",
        f"    rank 0: {str(torch.__version__)!r}",
        "    rank 1: '1.0'",
        "make them the same",
    ]
    assert on_ranks(2, _another_torch) == ["\n".join(expected)] * 2


def _late(member):
    if member.rank == 1:
        time.sleep(0.3)
    with member.communicator() as comm:
        return comm.all_reduce(torch.ones(1)).item()


def test_a_rank_may_come_late(on_ranks):
    assert on_ranks(2, _late) == [2.0, 2.0]


def _group_that_torch_does_not_know(member):
    store = dist.PrefixStore("gloo", member.store)
    group = init_gloo_process_group(store, member.rank, member.world_size, datetime.timedelta(seconds=20))
    with tcomm.Communicator(group, timeout=20.0) as comm:
        total = comm.all_reduce(torch.ones(3)).tolist()
        with pytest.raises(CapabilityError):
            comm.all_reduce(torch.ones(3), algorithm="torch")
        return total, comm.global_ranks, comm.name


def test_a_group_that_torch_does_not_know_has_nothing_to_fall_back_to(on_ranks):
    assert on_ranks(2, _group_that_torch_does_not_know) == [([2.0] * 3, (0, 1), "stateless")] * 2

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tcomm.errors import UsageError
from tcomm.groups.parallel.coordinator_arguments import (
    backend_of,
    check_initialized,
    local_rank_of,
    name_of,
    process_group_of,
    rows_of,
)


def test_there_is_a_world_first():
    with pytest.raises(UsageError, match=r"not initialized; call init_distributed_environment"):
        check_initialized()


def test_rows_become_plain_integers():
    rows = rows_of(np.arange(4).reshape(2, 2))
    assert rows == [[0, 1], [2, 3]]
    assert {type(rank) for row in rows for rank in row} == {int}
    assert rows_of(torch.tensor([[1, 0]])) == [[1, 0]]
    assert rows_of(((0,), (1, 2))) == [[0], [1, 2]]
    for wrong in (None, 3, [], [0, 1], "01", [["a"]], [[0.0]], [[True]], [[0], []]):
        with pytest.raises(UsageError, match="is no list of lists of ranks"):
            rows_of(wrong)


def test_a_local_rank_is_a_number():
    assert [local_rank_of(number) for number in (-1, 0, np.int64(3))] == [-1, 0, 3]
    for wrong in (None, "1", True, 1.0, -2):
        with pytest.raises(UsageError, match=f"local_rank={wrong!r} is no number"):
            local_rank_of(wrong)


def test_a_name_is_a_string():
    assert [name_of(name) for name in ("tp", "", None)] == ["tp", "anonymous", "anonymous"]
    with pytest.raises(UsageError, match="group_name=5 is no string"):
        name_of(5)


def test_a_backend_is_known_and_can_be_used(monkeypatch):
    for backend in ("gloo", "cpu:gloo", dist.Backend.GLOO):
        assert backend_of(backend) == backend
    for unknown in ("nope", "undefined", "", "cpu:gloo,cuda:nope"):
        with pytest.raises(UsageError, match=f"knows no backend {unknown!r}; it knows "):
            backend_of(unknown)
    for wrong in (None, 5):
        with pytest.raises(UsageError, match="is no string"):
            backend_of(wrong)
    monkeypatch.setattr(dist, "is_backend_available", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend_of("cpu:gloo,cuda:nccl") == "cpu:gloo,cuda:nccl"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="'nccl' cannot be used here"):
        backend_of("nccl")
    monkeypatch.setattr(dist, "is_backend_available", lambda name: name != "gloo")
    with pytest.raises(UsageError, match="'gloo' cannot be used here: gloo or its device is missing"):
        backend_of("gloo")


def test_a_process_group_is_one_that_torch_knows():
    for wrong in (None, "x", dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(UsageError, match="is no process group that this rank is in"):
            process_group_of(wrong)
    with pytest.raises(UsageError, match="does not know this process group"):
        process_group_of(dist.ProcessGroup(0, 1))

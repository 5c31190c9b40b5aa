import datetime
import sys
import types

import pytest
import torch
import torch.distributed as dist

from tcomm.groups.parallel import environment, parallel_state
from tcomm.groups.parallel.current_config import use_parallel_config
from tcomm.groups.parallel.parallel_config import ParallelConfig
from tcomm.groups.parallel.state import current
from tests.groups.parallel.engine import refusal


def _joined(member, path):
    told = refusal(environment.init_distributed_environment, distributed_init_method=None)
    environment.init_distributed_environment(
        2, member.rank, f"file://{path}", backend="nccl", timeout=datetime.timedelta(seconds=20)
    )
    world = parallel_state.get_world_group()
    found = dist.get_backend(), world.local_rank, world.ranks, parallel_state.get_node_count()
    environment.init_distributed_environment(2, member.rank, f"file://{path}", backend="gloo")
    assert parallel_state.get_world_group() is world, "once"
    environment.destroy_distributed_environment()
    assert current().world is None
    assert not dist.is_initialized()
    environment.destroy_distributed_environment()
    return told, found


def test_joining_by_a_file_with_a_backend_that_is_not_there(on_ranks, tmp_path):
    for rank, (told, found) in enumerate(on_ranks(2, _joined, str(tmp_path / "store"))):
        assert told == (
            "UsageError",
            "distributed_init_method must be provided when initializing distributed environment",
        )
        assert found == ("gloo", rank, [0, 1], 1)


def _adopted(member):
    member.process_group()
    environment.init_distributed_environment(backend="gloo")
    first = parallel_state.get_world_group().local_rank
    parallel_state.initialize_model_parallel(2)
    environment.destroy_model_parallel()
    environment.destroy_model_parallel()
    assert current().groups == {}
    assert dist.is_initialized()
    assert current().world is not None
    sys.modules["ray"] = types.SimpleNamespace(shutdown=lambda: calls.append(1))
    calls = []
    environment.cleanup_dist_env_and_memory(shutdown_ray=True)
    environment.cleanup_dist_env_and_memory()
    return first, calls, dist.is_initialized(), current().world


def test_a_world_that_is_there_is_adopted(on_ranks):
    assert on_ranks(2, _adopted) == [(0, [1], False, None)] * 2


def test_another_world_is_refused(monkeypatch):
    monkeypatch.setattr(current(), "world", types.SimpleNamespace(world_size=3))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(AssertionError, match="world group already initialized with a different world size"):
        environment.init_distributed_environment(backend="gloo")


def test_replicas_are_one_world(monkeypatch):
    asked = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options))
    monkeypatch.setattr(current(), "init_world", lambda *args: asked.update(local=args[0]))
    config = ParallelConfig(
        tensor_parallel_size=2,
        data_parallel_size=3,
        data_parallel_rank=2,
        distributed_executor_backend="mp",
    )
    port = config.data_parallel_master_port
    with use_parallel_config(config):
        environment.init_distributed_environment(2, 1, "env://", 4, "gloo")
    assert asked["world_size"] == 6
    assert asked["rank"] == 5
    assert asked["local"] == 4
    assert asked["init_method"].startswith("tcp://127.0.0.1:")
    assert int(asked["init_method"].split(":")[-1]) >= port > 0


def test_cleaning_up_what_is_not_there():
    environment.cleanup_dist_env_and_memory()
    assert not torch.cuda.is_initialized()
    with pytest.raises(ImportError):
        environment.cleanup_dist_env_and_memory(shutdown_ray=True)

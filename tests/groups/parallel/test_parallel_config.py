import dataclasses
import errno
import logging
import os
import socket
import sys
import types

import pytest
import torch
import torch.distributed as dist

from tcomm.errors import ConfigError
from tcomm.groups.helpers import loggers
from tcomm.groups.parallel import parallel_rules
from tcomm.groups.parallel.eplb_config import EPLBConfig
from tcomm.groups.parallel.parallel_config import ParallelConfig

DEFAULTS = {
    "pipeline_parallel_size": 1,
    "tensor_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "data_parallel_size": 1,
    "data_parallel_size_local": 1,
    "data_parallel_rank": 0,
    "data_parallel_rank_local": None,
    "data_parallel_index": 0,
    "data_parallel_master_ip": "127.0.0.1",
    "data_parallel_rpc_port": 29550,
    "data_parallel_master_port": 29500,
    "data_parallel_backend": "mp",
    "data_parallel_external_lb": False,
    "data_parallel_hybrid_lb": False,
    "is_moe_model": None,
    "enable_expert_parallel": False,
    "enable_eplb": False,
    "num_redundant_experts": 0,
    "eplb_window_size": 1000,
    "eplb_step_interval": 3000,
    "eplb_log_balancedness": False,
    "enable_elastic_ep": False,
    "elastic_ep_max_dp_size": None,
    "expert_placement_strategy": "linear",
    "all2all_backend": "allgather_reducescatter",
    "max_parallel_loading_workers": None,
    "disable_custom_all_reduce": False,
    "enable_dbo": False,
    "ubatch_size": 0,
    "dbo_decode_token_threshold": 32,
    "dbo_prefill_token_threshold": 512,
    "disable_nccl_for_dp_synchronization": None,
    "ray_workers_use_nsight": False,
    "ray_runtime_env": None,
    "placement_group": None,
    "distributed_executor_backend": None,
    "worker_cls": "auto",
    "sd_worker_cls": "auto",
    "worker_extension_cls": "",
    "master_addr": "127.0.0.1",
    "master_port": 29501,
    "node_rank": 0,
    "nnodes": 1,
    "distributed_timeout_seconds": None,
    "cpu_distributed_timeout_seconds": None,
    "dcp_kv_cache_interleave_size": 1,
    "cp_kv_cache_interleave_size": 1,
    "enable_multimodal_encoder_data_parallel": False,
    "rank": 0,
    "_api_process_count": 1,
    "_api_process_rank": 0,
}
COMPUTED = {"eplb_config", "world_size", "_data_parallel_master_port_list"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("TCOMM_", "VLLM_")) or name == "RANK":
            monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_the_fields_and_their_defaults():
    fields = {f.name: f for f in dataclasses.fields(ParallelConfig)}
    assert set(fields) == set(DEFAULTS) | COMPUTED
    assert {name: fields[name].default for name in DEFAULTS} == DEFAULTS
    config = ParallelConfig()
    assert config.eplb_config == EPLBConfig()
    # what the environment says of one replica, and what fits one process
    resolved = {
        **DEFAULTS,
        "data_parallel_rank_local": 0,
        "data_parallel_master_port": 0,
        "distributed_executor_backend": "uni",
    }
    assert {name: getattr(config, name) for name in DEFAULTS} == resolved
    with pytest.raises(TypeError):
        ParallelConfig(2)
    with pytest.raises(TypeError):
        ParallelConfig(world_size=2)


def test_world_sizes():
    config = ParallelConfig(
        pipeline_parallel_size=2,
        tensor_parallel_size=4,
        prefill_context_parallel_size=2,
        data_parallel_size=3,
        data_parallel_rank=2,
    )
    assert (config.world_size, config.world_size_across_dp) == (16, 48)
    assert (config.data_parallel_index, config.distributed_executor_backend) == (2, "mp")


def test_an_external_launcher_starts_the_ranks_of_all_replicas(monkeypatch, caplog):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with caplog.at_level(logging.INFO, "tcomm"):
        config = ParallelConfig(
            tensor_parallel_size=2, data_parallel_size=4, distributed_executor_backend="external_launcher"
        )
    assert (config.world_size, config.world_size_across_dp, config.data_parallel_rank) == (8, 8, 2)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "external launcher: set VLLM_ENABLE_V1_MULTIPROCESSING=0 in this process" in caplog.messages


@pytest.mark.parametrize("prefix", ["TCOMM", "VLLM"])
def test_the_environment_says_which_replica_this_is(monkeypatch, prefix):
    for name, value in {"SIZE": 4, "RANK": 3, "MASTER_IP": "::1", "MASTER_PORT": 4000}.items():
        monkeypatch.setenv(f"{prefix}_DP_{name}", str(value))
    config = ParallelConfig(tensor_parallel_size=2)
    place = (config.data_parallel_size, config.data_parallel_rank, config.data_parallel_rank_local)
    assert place == (4, 3, 3)
    assert (config.data_parallel_master_ip, config.data_parallel_master_port) == ("::1", 4000)
    monkeypatch.setenv(f"{prefix}_DP_RANK_LOCAL", "1")
    assert ParallelConfig().data_parallel_rank_local == 1
    assert ParallelConfig(data_parallel_size=2).data_parallel_rank == 0
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(is_moe_model=False)
    assert str(caught.value) == (
        "Offline data parallel mode is not supported/useful for dense models. Given: TCOMM_DP_SIZE=4; start "
        "independent processes instead"
    )


def test_the_backend_for_experts_can_be_overridden(monkeypatch, caplog):
    monkeypatch.setattr(loggers, "_told", set())
    monkeypatch.setenv("VLLM_ALL2ALL_BACKEND", "naive")
    assert {ParallelConfig().all2all_backend for _ in range(2)} == {"naive"}
    assert caplog.messages == ["TCOMM_ALL2ALL_BACKEND is deprecated; set ParallelConfig.all2all_backend"]


def test_custom_all_reduces_are_off_on_several_nodes_and_where_sums_have_an_order(monkeypatch):
    assert ParallelConfig(tensor_parallel_size=2).disable_custom_all_reduce is False
    assert ParallelConfig(tensor_parallel_size=2, nnodes=2).disable_custom_all_reduce is True
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert ParallelConfig().disable_custom_all_reduce is True


def test_a_free_port_is_kept_for_replicas_and_each_group_takes_the_next():
    config = ParallelConfig(data_parallel_size=2)
    ports = [config.data_parallel_master_port, *config._data_parallel_master_port_list]
    assert len(set(ports)) == 5
    with socket.socket() as foreign, pytest.raises(OSError, match="in use"):
        foreign.bind(("127.0.0.1", ports[1]))
    assert [config.get_next_dp_init_port() for _ in range(7)] == [*ports, ports[4] + 1, ports[4] + 2]
    assert config.data_parallel_master_port == ports[4] + 3


def test_a_port_that_was_given_is_used_and_one_that_is_none_refused():
    config = ParallelConfig(data_parallel_size=2, data_parallel_master_port=4000)
    assert [config.get_next_dp_init_port() for _ in range(2)] == [4000, 4001]
    for port in (0, 65536):
        config.data_parallel_master_port = port
        with pytest.raises(ConfigError) as caught:
            config.get_next_dp_init_port()
        assert str(caught.value) == (
            f"data_parallel_master_port={port} is no port to meet at; set it or TCOMM_DP_MASTER_PORT"
        )
    elsewhere = ParallelConfig(data_parallel_size=2, data_parallel_master_ip="192.0.2.1")
    assert elsewhere.data_parallel_master_port == 29500


BACKENDS = ["allgather_reducescatter", "naive", "deepep_high_throughput", "deepep_low_latency"]


@pytest.mark.parametrize("backend", [*BACKENDS, "pplx"])
def test_tokens_are_split_by_sequence_where_experts_are_wide(backend):
    wide = {"tensor_parallel_size": 2, "data_parallel_size": 2, "all2all_backend": backend}
    config = ParallelConfig(**wide, enable_expert_parallel=True)
    assert config.use_sequence_parallel_moe is (backend in BACKENDS)
    for change in (
        {"enable_expert_parallel": False},
        {"tensor_parallel_size": 1},
        {"data_parallel_size": 1},
    ):
        assert dataclasses.replace(config, **change).use_sequence_parallel_moe is False


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, False),
        ({"data_parallel_size": 2}, True),
        ({"prefill_context_parallel_size": 2}, False),
        ({"prefill_context_parallel_size": 2, "enable_expert_parallel": True}, True),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, False),
    ],
)
def test_tokens_travel_where_experts_are_elsewhere(fields, wanted):
    assert ParallelConfig(**fields).use_all2all is wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, (False, 0)),
        ({"enable_dbo": True}, (True, 2)),
        ({"ubatch_size": 1}, (False, 1)),
        ({"ubatch_size": 4}, (True, 4)),
    ],
)
def test_micro_batches(fields, wanted):
    config = ParallelConfig(**fields)
    assert (config.use_ubatching, config.num_ubatches) == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"tensor_parallel_size": 4}, (1, 0, 4)),
        ({"tensor_parallel_size": 8, "nnodes": 2, "node_rank": 1}, (2, 1, 4)),
        (
            {
                "tensor_parallel_size": 8,
                "nnodes": 4,
                "node_rank": 3,
                "data_parallel_size": 2,
                "data_parallel_size_local": 1,
            },
            (2, 1, 4),
        ),
        (
            {
                "tensor_parallel_size": 2,
                "nnodes": 2,
                "node_rank": 1,
                "data_parallel_size": 4,
                "data_parallel_size_local": 2,
            },
            (1, 0, 2),
        ),
    ],
)
def test_nodes_of_a_replica(fields, wanted):
    config = ParallelConfig(**fields)
    assert (config.nnodes_within_dp, config.node_rank_within_dp, config.local_world_size) == wanted


class Executor:
    uses_ray = True


@pytest.mark.parametrize(("backend", "wanted"), [("mp", False), (Executor, True), (int, False)])
def test_ray_is_used_where_it_starts_the_workers(backend, wanted):
    assert ParallelConfig(distributed_executor_backend=backend).use_ray is wanted


def test_the_executor_is_checked_again_on_request():
    config = ParallelConfig()
    assert config._verify_args() is config
    config.distributed_executor_backend = "threads"
    with pytest.raises(ConfigError, match="Unrecognized distributed executor backend 'threads'"):
        config._verify_args()


BASE = {
    "tensor_parallel_size": 4,
    "prefill_context_parallel_size": 2,
    "data_parallel_size": 2,
    "data_parallel_master_port": 4000,
    "enable_expert_parallel": True,
    "enable_eplb": True,
}
CHANGED = {
    "pipeline_parallel_size": 2,
    "tensor_parallel_size": 8,
    "prefill_context_parallel_size": 4,
    "decode_context_parallel_size": 8,
    "data_parallel_size": 3,
    "data_parallel_size_local": 2,
    "data_parallel_rank": 1,
    "data_parallel_rank_local": 1,
    "data_parallel_master_ip": "::1",
    "data_parallel_rpc_port": 1,
    "data_parallel_master_port": 4001,
    "data_parallel_backend": "ray",
    "data_parallel_external_lb": True,
    "data_parallel_hybrid_lb": True,
    "is_moe_model": True,
    "enable_expert_parallel": False,
    "enable_eplb": False,
    "eplb_config": EPLBConfig(policy="mine"),
    "num_redundant_experts": 2,
    "eplb_window_size": 2,
    "eplb_step_interval": 2,
    "eplb_log_balancedness": True,
    "enable_elastic_ep": True,
    "elastic_ep_max_dp_size": 4,
    "expert_placement_strategy": "round_robin",
    "all2all_backend": "pplx",
    "max_parallel_loading_workers": 2,
    "disable_custom_all_reduce": True,
    "enable_dbo": True,
    "ubatch_size": 3,
    "dbo_decode_token_threshold": 33,
    "dbo_prefill_token_threshold": 33,
    "disable_nccl_for_dp_synchronization": True,
    "ray_workers_use_nsight": True,
    "ray_runtime_env": object(),
    "placement_group": object(),
    "distributed_executor_backend": Executor,
    "worker_cls": "a.B",
    "sd_worker_cls": "a.B",
    "worker_extension_cls": "a.B",
    "master_addr": "::1",
    "master_port": 1,
    "node_rank": 1,
    "nnodes": 2,
    "distributed_timeout_seconds": 3,
    "cpu_distributed_timeout_seconds": 3,
    "dcp_kv_cache_interleave_size": 2,
    "cp_kv_cache_interleave_size": 2,
    "enable_multimodal_encoder_data_parallel": True,
    "rank": 1,
    "_data_parallel_master_port_list": [5],
    "_api_process_count": 2,
    "_api_process_rank": -1,
    "data_parallel_index": 1,
    "world_size": 64,
}


def test_the_hash_is_that_of_the_computation():
    base = ParallelConfig(**BASE)
    assert len(base.compute_hash()) == 64
    assert int(base.compute_hash(), 16)
    assert base.compute_hash() == ParallelConfig(**BASE, data_parallel_rank=1).compute_hash()
    assert {f.name for f in dataclasses.fields(base)} == set(CHANGED)
    told = {}
    for name, value in CHANGED.items():
        other = ParallelConfig(**BASE)
        setattr(other, name, value)
        told[name] = other.compute_hash()
    same = {name for name, digest in told.items() if digest == base.compute_hash()}
    assert same == parallel_rules.PLACEMENT
    assert len(set(told.values())) == len(CHANGED) - len(same) + 1


@pytest.fixture
def meetings(monkeypatch):
    """Stands in for the function that makes stateless groups; the list has what it was given."""
    calls, outcomes = [], []

    def make(host, port, rank, world_size, backend):
        calls.append((host, port, rank, world_size, backend))
        outcome = outcomes.pop(0) if outcomes else "group"
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    module = types.ModuleType("gloo")
    module.stateless_init_torch_distributed_process_group = make
    monkeypatch.setitem(sys.modules, "tcomm.groups.stateless.gloo", module)
    return calls, outcomes


def _replica():
    return ParallelConfig(data_parallel_size=3, data_parallel_rank=1, data_parallel_master_port=4000)


def test_replicas_meet_at_the_next_port_where_one_is_taken(meetings, caplog):
    calls, outcomes = meetings
    outcomes += [OSError(errno.EADDRINUSE, "taken")] * 2
    assert _replica().stateless_init_dp_group() == "group"
    assert calls == [("127.0.0.1", port, 1, 3, "gloo") for port in (4000, 4001, 4002)]
    assert caplog.messages == [f"data parallel port {p} is taken; trying the next one" for p in (4000, 4001)]


@pytest.mark.parametrize(
    ("code", "tries"), [(errno.EADDRINUSE, 5), (errno.EACCES, 1)], ids=["taken", "forbidden"]
)
def test_replicas_give_up_with_the_last_error(meetings, code, tries):
    calls, outcomes = meetings
    outcomes += [OSError(code, f"no {n}") for n in range(1, 9)]
    with pytest.raises(OSError, match=f"no {tries}"):
        _replica().stateless_init_dp_group()
    assert len(calls) == tries


def test_replicas_agree_about_work_pauses_and_memory(on_ranks):
    for rank, seen in enumerate(on_ranks(2, _agree)):
        assert seen == {
            "unfinished": [False, True, True, True],
            "state": [
                (False, False),
                (True, False),
                (True, False),
                (True, False),
                (False, True),
                (True, True),
            ],
            "memory": [2**63 - 1, 7, 5],
        }, rank


def _agree(member):
    member.process_group()
    group, rank = dist.group.WORLD, member.rank
    flags = [(False, False), (True, False), (False, True), (True, True)]
    # work of each rank, then its wish to pause
    states = [
        ((False, False), (False, False)),
        ((False, True), (False, False)),
        ((False, False), (True, False)),
        ((False, True), (False, True)),
        ((False, False), (True, True)),
        ((True, False), (True, True)),
    ]
    memory = [(-1, -1), (-1, 7), (9, 5)]
    for wrong in (None, 1.5, True, -2, "x", 1 << 63):
        with pytest.raises(ConfigError, match=f"kv_cache_memory={wrong!r} is no number of bytes"):
            ParallelConfig.sync_kv_cache_memory_size(group, wrong)
    return {
        "unfinished": [ParallelConfig.has_unfinished_dp(group, flag[rank]) for flag in flags],
        "state": [ParallelConfig.sync_dp_state(group, work[rank], pause[rank]) for work, pause in states],
        "memory": [ParallelConfig.sync_kv_cache_memory_size(group, size[rank]) for size in memory],
    }


def test_replicas_of_a_config_that_was_sent_to_them_meet_at_the_port_kept_for_them(on_ranks):
    config = ParallelConfig(data_parallel_size=2)
    ports = [config.data_parallel_master_port, *config._data_parallel_master_port_list]
    assert on_ranks(2, _meet, config) == [[(2, True, ports[2])] * 2] * 2


def _meet(member, config):
    from tcomm.groups.stateless.gloo import stateless_destroy_torch_distributed_process_group

    config = dataclasses.replace(config, data_parallel_rank=member.rank)
    groups = [config.stateless_init_dp_group() for _ in range(2)]
    seen = [
        (group.size(), config.has_unfinished_dp(group, member.rank == 1), config.data_parallel_master_port)
        for group in groups
    ]
    for group in groups:
        stateless_destroy_torch_distributed_process_group(group)
    return seen


def test_balancing_may_be_given_as_a_dict_or_none():
    config = ParallelConfig(eplb_config={"window_size": 3}, eplb_step_interval=5)
    assert config.eplb_config == EPLBConfig(window_size=3, step_interval=5)
    assert ParallelConfig(eplb_config=None).eplb_config == EPLBConfig()
    for wrong in (1.5, "x", {"windows": 3}):
        with pytest.raises(ConfigError, match="eplb_config"):
            ParallelConfig(eplb_config=wrong)


def test_what_has_no_hash_is_told():
    config = ParallelConfig()
    config.enable_dbo = object()
    with pytest.raises(ConfigError, match="has no hash"):
        config.compute_hash()

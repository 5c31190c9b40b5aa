import importlib.util
import os
import sys
import types

import numpy as np
import pytest
import torch

from tcomm.errors import ConfigError
from tcomm.groups.parallel import parallel_rules
from tcomm.groups.parallel.parallel_config import ParallelConfig

INTEGER = "is wrong; give an integer of"
WIDE = {"tensor_parallel_size": 2, "enable_expert_parallel": True}


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("TCOMM_", "VLLM_")):
            monkeypatch.delenv(name)
    _give_gpus(monkeypatch, 0)
    _give_ray(monkeypatch, False)


def _give_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def _give_ray(monkeypatch, is_installed):
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    found = types.SimpleNamespace() if is_installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "ray" else None)


def _enter_ray(monkeypatch, group):
    ray = types.ModuleType("ray")
    ray.is_initialized = lambda: True
    ray.util = types.SimpleNamespace(get_current_placement_group=lambda: group)
    monkeypatch.setitem(sys.modules, "ray", ray)


REFUSED = [
    *[
        ({name: wrong}, f"{name}={wrong!r} {INTEGER} 1 or more")
        for name in (
            "pipeline_parallel_size",
            "tensor_parallel_size",
            "prefill_context_parallel_size",
            "decode_context_parallel_size",
            "data_parallel_size",
            "nnodes",
            "dcp_kv_cache_interleave_size",
            "cp_kv_cache_interleave_size",
            "_api_process_count",
            "max_parallel_loading_workers",
            "elastic_ep_max_dp_size",
            "distributed_timeout_seconds",
            "cpu_distributed_timeout_seconds",
        )
        for wrong in (0, True)
    ],
    *[
        ({name: wrong}, f"{name}={wrong!r} is wrong; give True or False")
        for name in (
            "data_parallel_external_lb",
            "data_parallel_hybrid_lb",
            "enable_expert_parallel",
            "enable_eplb",
            "enable_elastic_ep",
            "disable_custom_all_reduce",
            "enable_dbo",
            "ray_workers_use_nsight",
            "enable_multimodal_encoder_data_parallel",
        )
        for wrong in (None, 1)
    ],
    *[
        ({name: "x"}, f"{name}='x' is wrong; give True, False or None")
        for name in ("is_moe_model", "disable_nccl_for_dp_synchronization")
    ],
    *[
        ({name: None}, f"{name}=None is wrong; give the name of a class")
        for name in ("worker_cls", "sd_worker_cls", "worker_extension_cls")
    ],
    *[
        ({name: wrong}, f"{name}={wrong!r} is wrong; give the name or address of a host")
        for name in ("data_parallel_master_ip", "master_addr")
        for wrong in (None, "", -1)
    ],
    *[
        ({name: "x"}, f"{name}='x' is wrong; give an integer")
        for name in ("data_parallel_rank", "data_parallel_rank_local")
    ],
    ({"tensor_parallel_size": np.int64(2)}, f"tensor_parallel_size={np.int64(2)!r} {INTEGER} 1 or more"),
    ({"ubatch_size": 10**30}, f"ubatch_size={10**30} {INTEGER} 0 or more"),
    ({"tensor_parallel_size": 2.0}, f"tensor_parallel_size=2.0 {INTEGER} 1 or more"),
    *[
        ({name: -1}, f"{name}=-1 {INTEGER} 0 or more")
        for name in ("data_parallel_size_local", "ubatch_size", "node_rank", "rank")
    ],
    ({"dbo_decode_token_threshold": -1}, f"dbo_decode_token_threshold=-1 {INTEGER} 0 or more"),
    ({"dbo_prefill_token_threshold": -1}, f"dbo_prefill_token_threshold=-1 {INTEGER} 0 or more"),
    *[
        ({name: 65536}, f"{name}=65536 {INTEGER} 0 to 65535")
        for name in ("data_parallel_rpc_port", "data_parallel_master_port", "master_port")
    ],
    ({"data_parallel_backend": "mpi"}, "data_parallel_backend='mpi' is none of mp, ray"),
    (
        {"expert_placement_strategy": "random"},
        "expert_placement_strategy='random' is none of linear, round_robin",
    ),
    (
        {"all2all_backend": "rdma"},
        "Unknown all2all backend: rdma; give one of " + ", ".join(parallel_rules.ALL2ALL_BACKENDS),
    ),
    ({"_api_process_rank": -2}, f"_api_process_rank=-2 {INTEGER} -1 or more"),
    ({"_api_process_rank": 1}, "_api_process_rank=1 is no rank of 1"),
    (
        {"tensor_parallel_size": 4, "decode_context_parallel_size": 3},
        "tensor_parallel_size=4 is no multiple of decode_context_parallel_size=3; give a divisor",
    ),
    (
        {
            "tensor_parallel_size": 4,
            "prefill_context_parallel_size": 2,
            "decode_context_parallel_size": 4,
        },
        "decode_context_parallel_size=4 does not fit tensor_parallel_size=4 and "
        "prefill_context_parallel_size=2; give 1, 2 or 8",
    ),
    (
        {"enable_dbo": True, "dbo_decode_token_threshold": 1},
        "dbo_decode_token_threshold=1 is less than the 2 micro-batches that a batch is cut into; each needs "
        "a token",
    ),
    (
        {"ubatch_size": 4, "dbo_prefill_token_threshold": 3},
        "dbo_prefill_token_threshold=3 is less than the 4 micro-batches that a batch is cut into; each needs "
        "a token",
    ),
    (
        {"data_parallel_size": 2, "data_parallel_size_local": 3},
        "data_parallel_size_local (3) must be <= data_parallel_size (2)",
    ),
    (
        {"data_parallel_size": 2, "data_parallel_rank": 2},
        "data_parallel_rank (2) must be in the range [0, 2)",
    ),
    (
        {"data_parallel_size": 2, "data_parallel_rank": -1},
        "data_parallel_rank (-1) must be in the range [0, 2)",
    ),
    (
        {"data_parallel_size_local": 0, "data_parallel_rank": 1},
        "data_parallel_rank (1) must be in the range [0, 1)",
    ),
    (
        {"data_parallel_external_lb": True},
        "data_parallel_external_lb can only be set when data_parallel_size > 1",
    ),
    (
        {"tensor_parallel_size": 2, "enable_eplb": True},
        "enable_expert_parallel must be True to use EPLB.",
    ),
    (
        {"enable_expert_parallel": True, "enable_eplb": True},
        "EPLB requires tensor_parallel_size, prefill_context_parallel_size or data_parallel_size to be "
        "greater than 1, but got TP=1, PCP=1, DP=1.",
    ),
    (
        {**WIDE, "num_redundant_experts": 2},
        "num_redundant_experts is set to 2 but EPLB is not enabled; set enable_eplb=True, or 0",
    ),
    *[
        (
            {**WIDE, "enable_eplb": True, "enable_elastic_ep": True, **wrong},
            "enable_elastic_ep needs enable_eplb=True, pipeline_parallel_size=1 and "
            "data_parallel_hybrid_lb=False",
        )
        for wrong in (
            {"enable_eplb": False},
            {"pipeline_parallel_size": 2},
            {"data_parallel_hybrid_lb": True},
        )
    ],
    (
        {
            **WIDE,
            "enable_eplb": True,
            "enable_elastic_ep": True,
            "data_parallel_size": 4,
            "elastic_ep_max_dp_size": 3,
        },
        "elastic_ep_max_dp_size=3 is less than data_parallel_size=4",
    ),
    ({"node_rank": 1}, "node_rank=1 is no rank of nnodes=1"),
    (
        {"tensor_parallel_size": 3, "nnodes": 2},
        "nnodes=2 do not hold data_parallel_size=1 replicas of 3 ranks, data_parallel_size_local=1 to a "
        "place; give sizes that divide",
    ),
    (
        {"data_parallel_size": 4, "nnodes": 2},
        "nnodes=2 do not hold data_parallel_size=4 replicas of 1 ranks, data_parallel_size_local=1 to a "
        "place; give sizes that divide",
    ),
    (
        {"distributed_executor_backend": "threads"},
        "Unrecognized distributed executor backend 'threads'. Supported values are ray, mp, uni, "
        "external_launcher, or a class",
    ),
    (
        {"distributed_executor_backend": "ray"},
        "distributed_executor_backend='ray' needs ray, which is not installed",
    ),
    (
        {"ray_workers_use_nsight": True},
        "Unable to use nsight profiling unless workers run with Ray.",
    ),
    (
        {"nnodes": 2, "tensor_parallel_size": 2, "distributed_executor_backend": int},
        "nnodes=2 needs distributed_executor_backend mp, uni or external_launcher, not <class 'int'>",
    ),
]


@pytest.mark.parametrize(("fields", "told"), REFUSED, ids=lambda case: str(case)[:50])
def test_what_cannot_be_is_refused(fields, told):
    with pytest.raises(ValueError, match=r".") as caught:
        ParallelConfig(**fields)
    assert isinstance(caught.value, ConfigError)
    assert str(caught.value) == told


@pytest.mark.parametrize(
    "fields",
    [
        {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
        *[
            {
                "tensor_parallel_size": 4,
                "prefill_context_parallel_size": 2,
                "decode_context_parallel_size": size,
            }
            for size in (1, 2, 8)
        ],
        {"enable_expert_parallel": True, "enable_eplb": True, "prefill_context_parallel_size": 2},
        {**WIDE, "enable_eplb": True, "enable_elastic_ep": True, "elastic_ep_max_dp_size": 8},
        {"data_parallel_size": 2, "data_parallel_external_lb": True, "data_parallel_size_local": 0},
        {"data_parallel_size_local": 0},
        {"_api_process_rank": -1},
        {"nnodes": 2, "tensor_parallel_size": 2, "distributed_executor_backend": "uni"},
    ],
)
def test_what_can_be_is_taken_as_it_is(fields):
    config = ParallelConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_balancing_experts_needs_no_gpu():
    assert ParallelConfig(**WIDE, enable_eplb=True, num_redundant_experts=4).num_redundant_experts == 4


TWO = {"tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("fields", "gpus", "has_ray", "wanted"),
    [
        ({}, 0, True, "uni"),
        (TWO, 0, True, "mp"),
        (TWO, 2, True, "mp"),
        (TWO, 1, True, "ray"),
        ({**TWO, "data_parallel_backend": "ray"}, 2, True, "ray"),
        ({**TWO, "placement_group": object()}, 2, True, "ray"),
        ({**TWO, "placement_group": object()}, 2, False, "mp"),
        ({**TWO, "nnodes": 2}, 1, False, "mp"),
        ({"distributed_executor_backend": "mp", **TWO}, 1, False, "mp"),
    ],
)
def test_what_starts_the_workers_is_what_fits(monkeypatch, fields, gpus, has_ray, wanted):
    _give_gpus(monkeypatch, gpus)
    _give_ray(monkeypatch, has_ray)
    assert ParallelConfig(**fields).distributed_executor_backend == wanted


@pytest.mark.parametrize(("group", "wanted"), [(object(), "ray"), (None, "mp")])
def test_who_is_placed_by_ray_stays_with_it(monkeypatch, group, wanted):
    _enter_ray(monkeypatch, group)
    config = ParallelConfig(**TWO)
    assert config.distributed_executor_backend == wanted
    assert config.use_ray is (wanted == "ray")


def test_more_ranks_than_gpus_need_ray_or_a_shared_gpu(monkeypatch):
    _give_gpus(monkeypatch, 1)
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(**TWO)
    assert str(caught.value) == (
        "a world of 2 ranks is larger than the 1 GPUs of this node; install ray, or give "
        "distributed_executor_backend, nnodes= or smaller sizes"
    )
    monkeypatch.setenv("TCOMM_ALLOW_SHARED_DEVICE", "1")
    assert ParallelConfig(**TWO).distributed_executor_backend == "mp"


def test_replicas_of_models_without_experts_are_not_offline():
    config = ParallelConfig(data_parallel_size=2, is_moe_model=False)
    with pytest.raises(ConfigError, match="Offline data parallel mode is not supported/useful"):
        parallel_rules.check_offline(config)
    config.is_moe_model = None
    assert parallel_rules.check_offline(config) is None


def test_nodes_of_a_replica():
    config = ParallelConfig(tensor_parallel_size=8, nnodes=4, data_parallel_size=2)
    assert parallel_rules.nodes_of_replica(config) == 2
    config.nnodes = 1
    assert parallel_rules.nodes_of_replica(config) == 1

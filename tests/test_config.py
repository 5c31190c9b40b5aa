import logging
import os

import pytest

from tcomm.config import (
    TIMEOUT_PROFILES,
    WITHOUT_EFFECT,
    Config,
    EngineConfig,
    _tell_without_effect,
    let_ranks_share_a_device,
    resolve_timeout,
    stop_engine_multiprocessing,
)
from tcomm.errors import ConfigError


def _message(function, *args):
    with pytest.raises(ConfigError) as caught:
        function(*args)
    return str(caught.value)


def test_without_variables_there_are_defaults():
    assert Config.from_environment({"PATH": "/bin", "XTCOMM_TABLE": "x"}) == Config()


def test_every_variable_is_read():
    given = {
        "TCOMM_ALGORITHM": "two_shot",
        "TCOMM_TIMEOUT": "2.5",
        "TCOMM_STAGING_BYTES": "131072",
        "TCOMM_SHM_DIR": "/tmp/shm",
        "TCOMM_TABLE": "table.json",
        "TCOMM_SPINS": "7",
        "TCOMM_DETERMINISTIC": "1",
        "TCOMM_NVSHMEM_HOME": "/opt/nvshmem",
        "TCOMM_ALLOW_SHARED_DEVICE": "1",
    }
    assert {f"TCOMM_{field.upper()}" for field in Config.__struct_fields__} == set(given)
    wanted = Config("two_shot", "2.5", 131072, "/tmp/shm", "table.json", 7, True, "/opt/nvshmem", True)
    assert Config.from_environment(given) == wanted


def test_the_environment_is_the_process_s_own(monkeypatch):
    monkeypatch.setenv("TCOMM_SPINS", "9")
    assert Config.from_environment().spins == 9


PAGES = "is no positive multiple of the page size, 4096"


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        (
            "STAGING_BYTES",
            "8M",
            "a TCOMM_ variable is wrong: Expected `int`, got `str` - at `$.staging_bytes`",
        ),
        ("STAGING_BYTES", "5000", f"TCOMM_STAGING_BYTES=5000 {PAGES}"),
        ("STAGING_BYTES", "0", f"TCOMM_STAGING_BYTES=0 {PAGES}"),
        ("STAGING_BYTES", "-4096", f"TCOMM_STAGING_BYTES=-4096 {PAGES}"),
        (
            "DETERMINISTIC",
            "maybe",
            "a TCOMM_ variable is wrong: Expected `bool`, got `str` - at `$.deterministic`",
        ),
        ("SPINS", "many", "a TCOMM_ variable is wrong: Expected `int`, got `str` - at `$.spins`"),
        (
            "TIMEOUT",
            "soon",
            "timeout 'soon' is neither seconds nor one of default, ml_inference, batch_job, streaming",
        ),
        ("TIMEOUT", "0", "timeout '0' is not a positive number of seconds"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(variable, value, told):
    assert _message(Config.from_environment, {f"TCOMM_{variable}": value}) == told


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("TCOMM_ALGORITM", "TCOMM_ALGORITM is not a variable of tcomm; did you mean TCOMM_ALGORITHM?"),
        (
            "TCOMM_STAGING_BYTE",
            "TCOMM_STAGING_BYTE is not a variable of tcomm; did you mean TCOMM_STAGING_BYTES?",
        ),
        ("TCOMM_XYZZY", "TCOMM_XYZZY is not a variable of tcomm"),
    ],
)
def test_an_unknown_variable_is_a_warning_with_the_closest_name(caplog, variable, told):
    with caplog.at_level(logging.WARNING, "tcomm"):
        assert Config.from_environment({variable: "1"}) == Config()
    assert caplog.messages == [told]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(None, None), (3, 3.0), (0.5, 0.5), ("7", 7.0), *TIMEOUT_PROFILES.items()],
)
def test_a_timeout_is_a_number_a_profile_or_none(given, seconds):
    assert resolve_timeout(given) == seconds


@pytest.mark.parametrize("given", [0, -1, -0.0, float("nan"), "0", "-3"])
def test_a_timeout_that_is_not_positive_is_refused(given):
    assert _message(resolve_timeout, given) == f"timeout {given!r} is not a positive number of seconds"


@pytest.mark.parametrize("given", ["abc", "", "5 s", [1], object])
def test_a_timeout_that_is_no_number_is_refused(given):
    assert _message(resolve_timeout, given) == (
        f"timeout {given!r} is neither seconds nor one of default, ml_inference, batch_job, streaming"
    )


ENGINE = {
    "secret": ("abc", "abc"),
    "host_ip": ("10.0.0.1", "10.0.0.1"),
    "port": ("1234", 1234),
    "pp_layer_partition": ("1,2", "1,2"),
    "local_rank": ("1", 1),
    "rank": ("2", 2),
    "world_size": ("4", 4),
    "master_addr": ("host", "host"),
    "master_port": ("5678", 5678),
    "cuda_visible_devices": ("0,2", "0,2"),
    "no_color": ("yes", "yes"),
    "dp_size": ("2", 2),
    "dp_rank": ("1", 1),
    "dp_rank_local": ("0", 0),
    "dp_master_ip": ("::1", "::1"),
    "dp_master_port": ("99", 99),
    "all2all_backend": ("naive", "naive"),
    "deepep_buffer_size_mb": ("64", 64),
    "nixl_ep_max_num_ranks": ("8", 8),
    "batch_invariant": ("1", True),
    "configure_logging": ("0", False),
    "logging_config_path": ("a.json", "a.json"),
    "logging_level": ("debug", "DEBUG"),
    "logging_prefix": ("> ", "> "),
    "logging_stream": ("ext://sys.stderr", "ext://sys.stderr"),
    "logging_color": ("1", "1"),
    "ringbuffer_warning_interval": ("5", 5),
}
UNUSED_VALUES = {str: ("x", "x"), bool: ("1", True), int: ("7", 7), type(None): ("7", 7)}
DEFAULTS = {
    "port": None,
    "local_rank": None,
    "dp_size": 1,
    "dp_rank": 0,
    "dp_master_ip": "127.0.0.1",
    "dp_master_port": 0,
    "batch_invariant": False,
    "logging_level": "INFO",
    "ringbuffer_warning_interval": 60,
    "sleep_when_idle": False,
    "cache_root": "~/.cache/vllm",
    "skip_p2p_check": True,
    "allreduce_use_symm_mem": True,
    "use_nccl_symm_mem": False,
    "disable_pynccl": False,
    "rocm_quick_reduce_quantization": "NONE",
    "rocm_quick_reduce_cast_bf16_to_fp16": True,
    "rocm_quick_reduce_max_size_bytes_mb": None,
    "deepep_buffer_size_mb": 1024,
    "deepep_high_throughput_force_intra_node": False,
    "deepep_low_latency_use_mnnvl": False,
    "deepepll_nvfp4_dispatch": False,
    "moe_dp_chunk_size": 256,
    "nixl_ep_max_num_ranks": 32,
    "allreduce_use_flashinfer": True,
    "allreduce_use_flashinfer_pcie_ipc": False,
    "flashinfer_allreduce_backend": "auto",
    "distributed_use_split_group": False,
    "deepep_v2_allow_hybrid_mode": True,
    "deepep_v2_prefer_overlap": False,
    "deepep_v2_allow_multiple_reduction": False,
    "elastic_ep_scale_up_launch": False,
    "flashinfer_moe_a2a_low_precision_combine": False,
    "moe_skip_padding": True,
}


@pytest.fixture
def untold():
    """Nobody was told yet what has no effect."""
    _tell_without_effect.cache_clear()
    yield
    _tell_without_effect.cache_clear()


def test_without_variables_the_group_layer_has_defaults(caplog):
    config = EngineConfig.from_environment({"PATH": "/bin", "TCOMM_PORT": "", "VLLM_PORT": ""})
    assert config == EngineConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert caplog.messages == []


def test_a_variable_is_named_after_its_field_and_a_few_are_plain():
    variables = EngineConfig.variables()
    assert list(variables) == list(EngineConfig.__struct_fields__)
    assert variables["secret"] == ("TCOMM_SECRET",)
    assert variables["dp_size"] == ("TCOMM_DP_SIZE", "VLLM_DP_SIZE")
    plain = {names for names in variables.values() if not names[0].startswith("TCOMM_")}
    assert plain == {
        (name,)
        for name in (
            "LOCAL_RANK",
            "RANK",
            "WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "CUDA_VISIBLE_DEVICES",
            "NO_COLOR",
        )
    }


@pytest.mark.parametrize("place", [0, -1])
def test_every_variable_of_the_group_layer_is_read_by_either_name(untold, place):
    unused = {field: UNUSED_VALUES[type(getattr(EngineConfig(), field))] for field in WITHOUT_EFFECT}
    values = {**ENGINE, **unused}
    assert set(values) == set(EngineConfig.__struct_fields__)
    environ = {EngineConfig.variables()[field][place]: text for field, (text, _) in values.items()}
    config = EngineConfig.from_environment(environ)
    assert {f: getattr(config, f) for f in values} == {f: value for f, (_, value) in values.items()}


def test_the_newer_name_counts_unless_it_is_empty(monkeypatch):
    for name, value in {"TCOMM_DP_SIZE": "2", "VLLM_DP_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert EngineConfig.from_environment().dp_size == 2
    monkeypatch.setenv("TCOMM_DP_SIZE", "")
    assert EngineConfig.from_environment().dp_size == 3


def test_a_variable_without_effect_is_told_once_with_the_reason(untold, caplog):
    for _ in range(2):
        EngineConfig.from_environment({"VLLM_NCCL_SO_PATH": "/lib/libnccl.so", "TCOMM_DP_SIZE": "2"})
        EngineConfig.from_environment({"TCOMM_DEEPEP_LOW_LATENCY_USE_MNNVL": "1"})
    assert caplog.messages == [
        "VLLM_NCCL_SO_PATH has no effect here: NCCL is torch's own, and reached through it",
        "TCOMM_DEEPEP_LOW_LATENCY_USE_MNNVL has no effect here: tokens go through memory that ranks share",
    ]


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("TCOMM_PORT", "tcp://1", "Expected `int | null`, got `str`"),
        ("VLLM_PORT", "65536", "Expected `int` <= 65535"),
        ("RANK", "-1", "Expected `int` >= 0"),
        ("VLLM_DP_SIZE", "0", "Expected `int` >= 1"),
        ("TCOMM_BATCH_INVARIANT", "perhaps", "Expected `bool`, got `str`"),
        ("TCOMM_LOGGING_LEVEL", "loud", "Invalid enum value 'LOUD'"),
        ("VLLM_SKIP_P2P_CHECK", "2", "Expected `bool`, got `str`"),
    ],
)
def test_a_wrong_variable_of_the_group_layer_is_named_as_it_was_given(variable, value, told):
    assert (
        _message(EngineConfig.from_environment, {variable: value}) == f"{variable}={value} is wrong: {told}"
    )


def test_variables_of_the_group_layer_are_known_to_the_other_reader(caplog):
    Config.from_environment({"TCOMM_DP_SIZE": "2", "TCOMM_RANK": "1", "TCOMM_DP_SIZ": "1"})
    assert caplog.messages == [
        "TCOMM_DP_SIZ is not a variable of tcomm; did you mean TCOMM_DP_SIZE?",
        "TCOMM_RANK is not a variable of tcomm; did you mean TCOMM_DP_RANK?",
    ]


def test_an_engine_is_told_of_its_external_launcher_once(monkeypatch, caplog):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with caplog.at_level(logging.INFO, "tcomm"):
        stop_engine_multiprocessing()
        stop_engine_multiprocessing()
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert caplog.messages == ["external launcher: set VLLM_ENABLE_V1_MULTIPROCESSING=0 in this process"]


def test_torch_is_told_of_a_shared_device_once(monkeypatch, caplog):
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "0")
    with caplog.at_level(logging.INFO, "tcomm"):
        let_ranks_share_a_device()
        let_ranks_share_a_device()
    assert os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] == "1"
    assert len(caplog.messages) == 1

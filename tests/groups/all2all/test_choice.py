import dataclasses

import pytest

from tcomm.errors import CapabilityError, ConfigError
from tcomm.groups.all2all.choice import BACKENDS, Exchanged, choose_backend

GB = 1 << 30
FEW = Exchanged(128, 7168, 8, 256, 32, device="cuda")
MANY = dataclasses.replace(FEW, max_tokens=8192)
NARROW = dataclasses.replace(MANY, world_size=2)
NBYTES = {"deepep_high_throughput": GB, "deepep_low_latency": 2 * GB, "nixl_ep": 2 * GB, "pplx": 2 * GB}


def _choose(exchanged, free=64 * GB, **options):
    return choose_backend(exchanged, NBYTES, free, **options)


def test_rows_are_counted_by_who_gets_them():
    assert (FEW.gathered_rows, FEW.rows_by_expert) == (128 * 31, 128 * 8 * 31 / 32)
    assert FEW.rows_by_rank == pytest.approx(128 * 31 * (1 - (31 / 32) ** 8))
    assert dataclasses.replace(FEW, topk=1).rows_by_rank == pytest.approx(128 * 31 / 32)
    assert FEW.row_nbytes == 14336


def test_tokens_ranks_and_capacity_decide():
    few, many, narrow = map(_choose, (FEW, MANY, NARROW))
    assert few.name == "deepep_low_latency"
    assert many.name == "deepep_high_throughput"
    assert narrow.name == "allgather_reducescatter"
    for choice in (few, many, narrow):
        assert choice.reason.startswith("model, not a measurement: ")
        assert {name for name, _ in choice.rejected} == BACKENDS.keys() - {choice.name}
        assert dict(choice.rejected)["nixl_ep"].endswith("ask for it by name")
        times = dict(choice.predicted_us)
        assert min(times, key=times.get) == choice.name


def test_dear_buffers_are_refused_with_their_bytes():
    choice = _choose(FEW, free=3 * GB)
    assert choice.name == "deepep_high_throughput"
    told = dict(choice.rejected)["deepep_low_latency"]
    assert told == f"its buffers need {2 * GB} bytes a rank, more than half of the {3 * GB} that are free"
    assert _choose(FEW, free=4 * GB).name == "deepep_low_latency"


def test_without_shared_memory_all_is_gathered():
    choice = _choose(FEW, no_shared_memory="they are on two hosts")
    assert (choice.name, dict(choice.rejected)["pplx"]) == (
        "allgather_reducescatter",
        "they are on two hosts",
    )
    assert choice.reason.endswith("nothing else can do it")
    uneven = _choose(dataclasses.replace(FEW, num_experts=255))
    assert uneven.name == "allgather_reducescatter"
    assert dict(uneven.rejected)["deepep_low_latency"] == "255 experts do not divide among 32 ranks"


def test_what_is_asked_for_by_name_is_used_or_refused():
    choice = _choose(FEW, forced="pplx")
    assert (choice.name, choice.reason) == ("pplx", "'pplx' was asked for by name")
    assert dict(choice.rejected)["naive"] == "'pplx' was asked for"
    with pytest.raises(CapabilityError, match=r"'pplx', which was asked for, cannot be used: its buffers"):
        _choose(FEW, free=GB, forced="pplx")
    with pytest.raises(ConfigError, match="all2all backend 'rdma' is unknown; give one of auto, allg"):
        _choose(FEW, forced="rdma")


def test_a_choice_explains_itself():
    text = str(_choose(FEW)).splitlines()
    assert text[0] == (
        "128 tokens a rank of 14336 bytes, 8 of 256 experts on 32 ranks (cuda): deepep_low_latency"
    )
    reason = "model, not a measurement: 111 us against 117 us of deepep_high_throughput"
    assert text[1:3] == [f"  because {reason}", "  not allgather_reducescatter: model: 395 us"]
    assert len(text) == 1 + len(BACKENDS)


@pytest.mark.parametrize("field", ["max_tokens", "hidden", "topk", "num_experts", "world_size", "itemsize"])
def test_numbers_make_sense(field):
    for wrong in (0, "8", 2.5):
        with pytest.raises(ConfigError, match=f"{field}={wrong!r} of an exchange"):
            dataclasses.replace(FEW, **{field: wrong})


def test_tokens_are_on_a_device_that_is_known():
    with pytest.raises(ConfigError, match="device='xpu' of an exchange of tokens; give 'cpu' or 'cuda'"):
        dataclasses.replace(FEW, device="xpu")


@pytest.mark.parametrize(
    ("tokens", "ranks", "name"),
    [
        (1, 4, "allgather_reducescatter"), (128, 4, "allgather_reducescatter"),
        (4096, 4, "deepep_high_throughput"), (128, 8, "deepep_high_throughput"),
        (4096, 8, "deepep_high_throughput"), (1, 64, "deepep_low_latency"),
        (128, 64, "deepep_low_latency"), (4096, 64, "deepep_high_throughput"),
    ],
)  # fmt: skip
def test_few_ranks_gather_many_tokens_travel_once_and_few_tokens_to_many_ranks_go_fast(tokens, ranks, name):
    assert _choose(dataclasses.replace(FEW, max_tokens=tokens, world_size=ranks)).name == name

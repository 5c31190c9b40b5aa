import pytest
import torch

from tcomm.algorithms import ALGORITHMS, FAMILIES, GPU_ALGORITHMS
from tcomm.presets import PRESETS, named_topology
from tcomm.tuning.choose import make_request
from tcomm.tuning.model import predict_us

KIB, MIB = 1 << 10, 1 << 20
LL, PUSH, TWO = "triton:one_shot_ll", "triton:one_shot_push", "triton:two_shot"
NVLS, NCCL = "triton:multimem_two_shot", "torch:nccl"


def _us(algorithm, topology, nbytes, verb="all_reduce"):
    topology = named_topology(topology)
    request = make_request(verb, "sum", torch.bfloat16, nbytes, topology.world_size, "cuda")
    return predict_us(algorithm, request, topology)


def _crossover(topology, small, large):
    """Bytes from which `large` is faster; None where it is not up to 1 GiB."""
    if _us(large, topology, 1 << 30) >= _us(small, topology, 1 << 30):
        return None
    low, high = 1, 1 << 30
    while high - low > 1:
        middle = (low + high) // 2
        if _us(large, topology, middle) < _us(small, topology, middle):
            high = middle
        else:
            low = middle
    return high


@pytest.mark.parametrize(
    ("topology", "small", "large", "kilobytes"),
    [
        ("h100x2", LL, PUSH, 350),
        ("h100x4", LL, PUSH, 117),
        ("h100x4", PUSH, TWO, 470),
        ("h100x4", PUSH, NVLS, 400),
        ("h100x8", LL, PUSH, 50),
        ("h100x8", PUSH, TWO, 134),
        ("h100x8", PUSH, NVLS, 120),
        ("h200x8", LL, PUSH, 50),
        ("b200x2", LL, PUSH, 700),
        ("b200x4", LL, PUSH, 234),
        ("b200x4", PUSH, TWO, 940),
        ("b200x4", PUSH, NVLS, 800),
        ("b200x8", LL, PUSH, 100),
        ("b200x8", PUSH, TWO, 268),
        ("b200x8", PUSH, NVLS, 240),
    ],
)
def test_short_messages_cross_over_where_alpha_and_beta_say(topology, small, large, kilobytes):
    assert _crossover(topology, small, large) / KIB == pytest.approx(kilobytes, rel=0.2)


@pytest.mark.parametrize(
    ("topology", "algorithm", "low", "high"),
    [
        ("h100x4", TWO, 25, 38),
        ("h100x8", TWO, 16, 40),
        ("h100x8", NVLS, 48, 77),
        ("b200x4", TWO, 32, 48),
        ("b200x8", NVLS, 32, 64),
    ],
)
def test_long_messages_go_to_nccl_about_where_it_was_measured_faster(topology, algorithm, low, high):
    assert low <= _crossover(topology, algorithm, NCCL) / MIB <= high


@pytest.mark.parametrize("topology", ["h100x2", "b200x2", "pcie2"])
def test_two_ranks_never_gain_by_a_second_step(topology):
    best = "triton:one_shot_pull"
    assert _crossover(topology, best, TWO) is None
    for nbytes in (KIB, 64 * KIB, MIB):
        assert _us(PUSH, topology, nbytes) < _us(TWO, topology, nbytes)


@pytest.mark.parametrize(
    ("topology", "nbytes", "expected"),
    [
        ("h100x8", 64 * KIB, (6.0, 5.8, 6.8, 6.7)),
        ("h100x8", 256 * KIB, (13.7, 9.6, 7.8, 7.3)),
        ("h100x8", MIB, (44, 25, 11.6, 9.8)),
        ("b200x8", 256 * KIB, (8.6, 7.0, 7.1, 6.9)),
        ("b200x8", MIB, (24, 14.7, 9.0, 8.1)),
    ],
)
def test_predicted_times_are_those_of_the_model(topology, nbytes, expected):
    times = [_us(algorithm, topology, nbytes) for algorithm in (LL, PUSH, TWO, NVLS)]
    assert times == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("algorithm", "topology", "mib", "measured"),
    [
        *((NVLS, "h100x8", mib, us) for mib, us in ((8, 46), (16, 87), (32, 165), (64, 320), (128, 631))),
        *((NCCL, "h100x8", mib, us) for mib, us in ((1, 25), (8, 76), (64, 316), (128, 561))),
        *((NVLS, "b200x6", mib, us) for mib, us in ((32, 132), (128, 541))),
        *((NCCL, "b200x6", mib, us) for mib, us in ((1, 27), (4, 46), (128, 393))),
    ],
)
def test_long_messages_take_about_what_others_measured(algorithm, topology, mib, measured):
    assert _us(algorithm, topology, mib * MIB) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_every_kernel_has_a_time_for_every_verb_that_grows_with_the_message(name):
    topology = named_topology(name)
    if topology.world_size == 1:
        return
    for verb, family in FAMILIES.items():
        known = (*ALGORITHMS[family], *GPU_ALGORITHMS.get(family, ()))
        for algorithm in (*(a.name for a in known if a.engine == "triton"), "torch:nccl"):
            request = [
                make_request(verb, "sum", torch.float32, nbytes, topology.world_size, "cuda")
                for nbytes in (0, KIB, 64 * KIB, MIB, 16 * MIB, 1 << 30)
            ]
            times = [predict_us(algorithm, r, topology) for r in request]
            assert all(isinstance(us, float) and us > 0 for us in times), (verb, algorithm)
            assert times == sorted(times), (verb, algorithm)


def test_the_model_knows_nothing_of_other_engines():
    for algorithm in ("torch:gloo", "torch:none", "cpu:two_shot", "triton:unheard_of"):
        assert _us(algorithm, "h100x8", MIB) is None


def test_the_links_decide_where_nothing_was_measured():
    pcie, nvlink4, nvlink5 = (_us(PUSH, name, MIB) for name in ("pcie2", "h100x2", "b200x2"))
    assert pcie > 3 * nvlink4 > 3 * nvlink5
    slow, fast = (_us("triton:hierarchical", name, 16 * MIB) for name in ("2xa100x8", "2xh100x8"))
    assert slow > 1.5 * fast

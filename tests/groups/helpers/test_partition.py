import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcomm.errors import ConfigError
from tcomm.groups.helpers.partition import (
    divide,
    ensure_divisibility,
    get_pp_indices,
    verify_group_size_divides_partition,
)

VARIABLES = ("TCOMM_PP_LAYER_PARTITION", "VLLM_PP_LAYER_PARTITION")


@pytest.fixture(autouse=True)
def _no_partition(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def _message(function, *args, kind=ConfigError, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def test_what_divides_is_divided():
    assert divide(12, 4) == 3
    assert divide(0, 5) == 0
    assert ensure_divisibility(12, 4) is None


@pytest.mark.parametrize("function", [divide, ensure_divisibility])
@pytest.mark.parametrize("kind", [AssertionError, ConfigError, ValueError])
def test_what_does_not_divide_is_refused(function, kind):
    assert _message(function, 7, 2, kind=kind) == "7 is not divisible by 2"
    with pytest.raises(ZeroDivisionError):
        function(7, 0)


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        (5, [1, 1, 2, 1]),
        (7, [2, 3, 2]),
        (11, [3, 3, 3, 2]),
        (22, [5, 6, 6, 5]),
        (8, [2, 2, 2, 2]),
        (9, [9]),
        (2, [0, 1, 1, 0]),
        (0, [0, 0]),
    ],
)
def test_layers_left_over_go_before_the_last_stage(layers, sizes):
    ranges = [get_pp_indices(layers, stage, len(sizes)) for stage in range(len(sizes))]
    assert [end - start for start, end in ranges] == sizes
    assert [start for start, _ in ranges] == [sum(sizes[:n]) for n in range(len(sizes))]


def test_the_documented_ranges():
    assert [get_pp_indices(5, stage, 4) for stage in range(4)] == [(0, 1), (1, 2), (2, 4), (4, 5)]


@given(st.integers(0, 200), st.integers(1, 64))
def test_every_layer_is_in_one_stage(layers, stages):
    ranges = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    assert [layer for start, end in ranges for layer in range(start, end)] == list(range(layers))


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_variable_says_how_many_layers_a_stage_has(monkeypatch, variable):
    monkeypatch.setenv(variable, "5, 5,6,4")
    assert [get_pp_indices(20, stage, 4) for stage in range(4)] == [(0, 5), (5, 10), (10, 16), (16, 20)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("5,x", "Invalid partition string: 5,x; give integers, such as 5,5,6,4"),
        ("5,,5", "Invalid partition string: 5,,5; give integers, such as 5,5,6,4"),
        ("11,-1", "Invalid partition string: 11,-1; no stage has fewer than 0 layers"),
        ("5,4,1", "len(partitions)=3 does not match pp_size=2"),
        ("5,4", "sum(partitions)=9 does not match num_hidden_layers=10"),
    ],
)
def test_a_partition_that_does_not_fit_is_refused(monkeypatch, text, told):
    monkeypatch.setenv("TCOMM_PP_LAYER_PARTITION", text)
    assert _message(get_pp_indices, 10, 0, 2) == told


@pytest.mark.parametrize("wrong", [(4, 2, 2), (4, -1, 2), (4, 0, 0), (-1, 0, 1)])
def test_a_stage_that_does_not_exist_is_refused(wrong):
    layers, rank, size = wrong
    assert _message(get_pp_indices, *wrong) == (
        f"stage {rank} of {size} with {layers} layers: stages are 0 to pp_size - 1, and there are no fewer "
        "than 0 layers"
    )


def test_quantisation_groups_are_whole():
    verify_group_size_divides_partition(256, 128)
    verify_group_size_divides_partition(100, -1, "mlp")
    remedy = "use another tensor parallel size or another group size"
    assert _message(verify_group_size_divides_partition, 100, 64) == (
        f"the input of one rank's part of a layer, 100, is not divisible by a group size of 64; {remedy}"
    )
    assert _message(verify_group_size_divides_partition, 100, 0, "mlp.up", "Or pad it.") == (
        f"the input of one rank's part of layer mlp.up, 100, is not divisible by a group size of 0; "
        f"{remedy}. Or pad it."
    )

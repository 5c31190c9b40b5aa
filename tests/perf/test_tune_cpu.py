import pytest

from perf.tune_cpu import choose, rows_of


@pytest.mark.parametrize(
    ("times", "before", "chosen"),
    [
        ({"cpu:push@0": 10.0, "cpu:pull@0": 9.0}, "", "cpu:pull@0"),
        ({"cpu:push@0": 10.0, "cpu:pull@0": 9.0}, "cpu:push@0", "cpu:pull@0"),
        ({"cpu:push@0": 10.0, "cpu:pull@0": 9.6}, "cpu:push@0", "cpu:push@0"),
        ({"cpu:push@0": 10.0, "cpu:push@65536": 9.6, "cpu:pull@0": 11.0}, "cpu:pull@0", "cpu:push@0"),
        ({"cpu:push@0": 10.0, "cpu:push@65536": 9.0, "cpu:pull@0": 11.0}, "cpu:pull@0", "cpu:push@65536"),
        ({"cpu:push@0": 10.0, "torch:gloo@0": 1.0}, "cpu:pull@0", "cpu:push@0"),
    ],
)
def test_only_what_gains_more_than_noise_changes_the_choice(times, before, chosen):
    assert choose(times, before) == chosen


def test_sizes_that_are_done_alike_are_one_row_with_the_time_of_what_is_done():
    measured = {
        "4096": {"cpu:push@0": 10.0, "cpu:push@1024": 9.7, "torch:gloo@0": 99.96},
        "1024": {"cpu:push@0": 3.0, "cpu:pull@0": 4.0, "torch:gloo@0": 80.0},
        "16384": {"cpu:push@0": 40.0, "cpu:push@1024": 30.0, "torch:gloo@0": 200.0},
    }
    first, last = rows_of("reduce", measured, 4, 3, 16)
    assert (first.op, first.algorithm, first.max_nbytes, first.piece_nbytes) == (
        "reduce",
        "cpu:push",
        4096,
        0,
    )
    assert (first.min_ranks, first.max_ranks, first.measured_at) == (3, 16, "4 ranks, 4096 bytes")
    assert first.measured_us == {"cpu:push": 10.0, "torch:gloo": 100.0}
    assert (last.algorithm, last.max_nbytes, last.piece_nbytes) == ("cpu:push", None, 1024)
    assert last.measured_us == {"cpu:push": 30.0, "torch:gloo": 200.0}

import itertools
import time

import numpy as np
import pytest
import torch

from tcomm.tuning.measure import Candidate, Schedule, bus_factor, summarise, time_alternating


def _recorded(name, log, seconds=0.0, wrong=()):
    wrong = iter(wrong)

    def run():
        log.append(f"run {name}")
        time.sleep(seconds)

    return Candidate(
        run,
        lambda: log.append(f"prepare {name}"),
        lambda: (log.append(f"check {name}"), next(wrong, 0))[1],
    )


def test_candidates_take_turns_in_blocks_and_every_call_is_prepared_and_checked():
    log = []
    candidates = {"a": _recorded("a", log), "b": _recorded("b", log)}
    seconds, wrong = time_alternating(candidates, Schedule(2, 3, 1), lambda: log.append("barrier"))
    call = {name: [f"prepare {name}", "barrier", f"run {name}", f"check {name}"] for name in "ab"}
    assert log == 2 * (4 * call["a"] + 4 * call["b"])
    assert {name: len(values) for name, values in seconds.items()} == {"a": 6, "b": 6}
    assert wrong == {"a": 0, "b": 0}


def test_all_settle_after_a_call_before_anyone_checks():
    log = []
    time_alternating(
        {"a": _recorded("a", log)},
        Schedule(1, 1, 0),
        lambda: log.append("barrier"),
        lambda: log.append("settle"),
    )
    assert log == ["prepare a", "barrier", "run a", "settle", "check a"]


def test_only_the_call_itself_is_timed_and_warm_ups_are_not():
    slow = itertools.chain([0.2], itertools.repeat(0.0))
    candidate = Candidate(lambda: time.sleep(next(slow)), lambda: time.sleep(0.01), lambda: 0)
    seconds, _ = time_alternating({"a": candidate}, Schedule(1, 4, 1), lambda: time.sleep(0.01))
    assert seconds["a"].max() < 0.01


def test_wrong_elements_are_counted_over_all_calls_warm_ups_included():
    candidates = {"a": _recorded("a", [], wrong=[3, 0, 4])}
    _, wrong = time_alternating(candidates, Schedule(1, 2, 1), lambda: None)
    assert wrong == {"a": 7}


def test_the_slowest_rank_of_each_call_counts():
    mine, other = np.array([1e-6, 5e-6, 3e-6]), torch.tensor([2e-6, 1e-6, 9e-6], dtype=torch.float64)
    summary = summarise(mine, lambda values: torch.cat([values, other]))
    assert summary.median_us == pytest.approx(5.0)
    assert summary.p10_us == pytest.approx(2.6)
    assert summary.p90_us == pytest.approx(8.2)


@pytest.mark.parametrize(
    ("op", "world_size", "factor"),
    [
        ("all_reduce", 2, 1.0),
        ("all_reduce", 4, 1.5),
        ("all_gather", 4, 0.75),
        ("broadcast", 4, 1.0),
        ("all_gatherv", 4, 0.75),
        ("reduce_scatterv", 2, 0.5),
        ("scatter", 4, 0.75),
        ("sendrecv", 2, 1.0),
    ],
)
def test_bus_bandwidth_is_nccl_tests(op, world_size, factor):
    assert bus_factor(op, world_size) == factor

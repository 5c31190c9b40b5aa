"""Every collective on tcomm, gloo and MPI: `make bench`.

The three contenders of a case are timed in one run, in alternating blocks, by the timer of `tcomm bench`;
each then gives its own calls to pytest-benchmark. A round is a call, and its time that of the slowest rank.
"""

from __future__ import annotations

import pytest

from perf.cases import TIMEOUT, Key
from tcomm.tuning.measure import percentiles


class Replay:
    """A clock that shows what was measured: it stands still but for the call that is replayed."""

    def __init__(self):
        self._now = 0.0

    def __repr__(self):
        return "replay of measured calls"

    def __call__(self):
        return self._now

    def rewind(self):
        # Every round starts at 0, so that its duration is the measured one to the last bit.
        self._now = 0.0

    def advance(self, seconds):
        self._now += seconds


REPLAY = Replay()


@pytest.mark.timeout(TIMEOUT + 60)
# Where there is nothing to replay, there is a failure or a reason to skip.
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")
@pytest.mark.benchmark(timer=REPLAY, disable_gc=False, warmup=False)
def test_collective(benchmark, bench, op, nbytes, ranks, out, impl):
    if impl == "mpi" and bench.no_mpi:
        pytest.skip(f"no MPI: {bench.no_mpi}")
    key = Key(op, nbytes, ranks, out)
    measured = bench.of(key)
    calls = measured.microseconds[impl]
    replayed = (us / 1e6 for us in calls)
    benchmark.group = key.id
    benchmark.extra_info.update(_describe(bench, key, impl, measured))
    benchmark.pedantic(lambda: REPLAY.advance(next(replayed)), setup=REPLAY.rewind, rounds=len(calls))


def _describe(bench, key, impl, measured):
    mine, gloo = (percentiles(measured.microseconds[name]) for name in (impl, "gloo"))
    return {
        "op": key.op,
        "nbytes": key.nbytes,
        "ranks": key.ranks,
        "out": key.out,
        "impl": impl,
        "dtype": measured.dtype,
        "algorithm": measured.algorithm if impl == "tcomm" else impl,
        "affinity": measured.affinity,
        "blocks": bench.blocks,
        "median_us": mine.median_us,
        "p10_us": mine.p10_us,
        "p90_us": mine.p90_us,
        "ratio": gloo.median_us / mine.median_us,
    }

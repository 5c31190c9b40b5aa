from tests.examples.test_minilm import ROOT, _first_rank_alone, _ranks, needs_model

EXAMPLE = ROOT / "examples" / "moe_layer.py"
KINDS = ("float32", "bfloat16", "fp8")
ONCE_A_RANK = ("high_throughput", "one_sided", "two_sided")
BACKENDS = (*ONCE_A_RANK, "low_latency", "all_gather", "naive")

BREAK_COMBINE = """
import os
import runpy
import sys

from tcomm.groups.moe.host_engine import HostEngine

right = HostEngine.combine


def combine(self, job):
    out, weights = right(self, job)
    return out * 0.99, weights


HostEngine.combine = combine
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _rows(out):
    """Cells of the table by backend and kind."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    return {(row[0], row[1]): row[2:] for row in cells if len(row) == 7 and row[0] in BACKENDS}


@needs_model
def test_every_backend_agrees_with_the_whole_layer_and_tells_its_bytes(programs):
    code, out, err = _ranks(programs, 2, EXAMPLE)
    assert code == 0, out + err
    assert out.splitlines()[-1] == "ok"
    assert out.isascii()
    rows = _rows(out)
    assert set(rows) == {(name, kind) for name in BACKENDS for kind in KINDS} | {
        ("high_throughput", "gradients")
    }
    for (name, kind), (difference, _, wire, least, _) in rows.items():
        exact = kind in {"float32", "gradients"}
        assert float(difference) <= (1e-5 if exact else 6e-2), (name, kind)
        if kind != "gradients":
            assert int(wire) >= int(least) > 0
            assert (int(wire) <= 1.02 * int(least)) == (name in ONCE_A_RANK), (name, kind)


@needs_model
def test_a_sum_that_is_wrong_fails_the_demo(programs, tmp_path):
    broken = tmp_path / "break_combine.py"
    broken.write_text(BREAK_COMBINE)
    code, out, err = _ranks(programs, 2, broken, EXAMPLE, "--backend", "high_throughput")
    assert code != 0
    assert "ok" not in out.splitlines()
    assert "high_throughput, float32: " in err
    assert "gradients are" in err


@needs_model
def test_ranks_that_cannot_share_the_experts_are_a_sentence_before_they_meet(programs):
    code, err = _first_rank_alone(programs, 3, EXAMPLE, "--backend", "naive")
    assert code == 1
    assert err == "error: a world of 3 cannot share 64 experts; give a divisor\n"

import pytest

from tests.examples.test_minilm import ROOT, _first_rank_alone, _ranks, needs_model

EXAMPLE = ROOT / "examples" / "balanced_experts.py"

BREAK_COMMIT = """
import os
import runpy
import sys

from tcomm.eplb.moving.symmetric import SymmetricMover

SymmetricMover.commit = lambda self, layer, moves, weights: None
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _loads(out):
    """Load of the busiest rank over the mean, before and after, layer by layer."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    return [(float(row[1]), float(row[2])) for row in cells if len(row) == 3 and row[0].isdigit()]


@needs_model
def test_experts_move_while_the_model_runs_and_nothing_else_changes(programs):
    code, out, err = _ranks(programs, 4, EXAMPLE, "--asynchronous")
    assert code == 0, out + err
    assert out.splitlines()[-1] == "ok"
    assert out.isascii()
    loads = _loads(out)
    assert len(loads) == 4
    assert all(1 <= after < before for before, after in loads)
    assert "balancedness 0." in out


@needs_model
def test_weights_that_stay_where_they_were_fail_the_demo(programs, tmp_path):
    broken = tmp_path / "break_commit.py"
    broken.write_text(BREAK_COMMIT)
    code, out, err = _ranks(programs, 2, broken, EXAMPLE)
    assert code != 0
    assert "ok" not in out.splitlines()
    assert "from the whole layers" in err


@needs_model
@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_that_cannot_share_the_slots_are_a_sentence_before_they_meet(programs, world_size):
    code, err = _first_rank_alone(programs, world_size, EXAMPLE)
    assert code == 1
    assert err.startswith(f"error: a world of {world_size} cannot share 80 slots; start it with torchrun")
    assert len(err.splitlines()) == 1

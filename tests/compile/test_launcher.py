"""Bound calls through Triton's own launcher, down to what a libcuda gets that runs nothing."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import triton

from tests.virtual_worlds import CASES

HERE = pathlib.Path(__file__).parent


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, which Triton's launcher needs too")
def test_the_driver_gets_what_a_call_means(tmp_path):
    include = pathlib.Path(triton.__file__).parent / "backends/nvidia/include"
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-w", f"-I{include}", "-o", library, HERE / "libcuda.c"],
        check=True,
        timeout=60,
    )
    environment = {
        **os.environ, "TRITON_INTERPRET": "0", "TRITON_LIBCUDA_PATH": str(tmp_path),
        "LD_LIBRARY_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile.launch_on_stub"], cwd=HERE.parents[1], env=environment,
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["launched", str(2 * len(CASES) + 2 * 4)]

"""Kernels with NVSHMEM linked into them. Needs its wheel of 180 MB, which `make compile-nvshmem` installs."""

import os

import pytest
import triton

from tcomm.errors import CapabilityError
from tcomm.memory.nvshmem_bitcode import find_bitcode


def _why_not():
    if os.environ.get("TRITON_INTERPRET") != "0":
        return "kernels are interpreted here; run `make compile-nvshmem`"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        return f"the LLVM of Triton {triton.__version__} cannot read NVSHMEM's bitcode; 3.7 and later can"
    try:
        find_bitcode(90)
    except CapabilityError as error:
        return f"{error}; `make compile-nvshmem` installs it"
    return ""


REASON = _why_not()

collect_ignore_glob = ["test_*.py"] if REASON else []

if not REASON:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def pytest_report_header():
    return f"tests/compile_nvshmem: left out: {REASON}" if REASON else None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Nothing collected is fine where there is a reason, which the header shows."""
    if REASON and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture(scope="session", autouse=True)
def fresh_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield

import os

import pytest

COMPILED = os.environ.get("TRITON_INTERPRET") == "0"
COMMAND = "TRITON_INTERPRET=0 python -m pytest tests/compile"

collect_ignore_glob = [] if COMPILED else ["test_*.py"]

if COMPILED:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def pytest_report_header():
    return None if COMPILED else f"tests/compile: left out, kernels are interpreted here; run {COMMAND}"


@pytest.fixture(scope="session", autouse=True)
def fresh_cache(tmp_path_factory):
    # One for all workers of a run: what one has compiled, another reads.
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(shared / "triton"))
        yield

"""Tests that need a GPU: `python -m pytest -m gpu`. Without one, the whole directory is one skipped test."""

import os
import pathlib

import pytest
import torch

HERE = pathlib.Path(__file__).parent


def why_not():
    """Why nothing here can run; empty when it can."""
    if not torch.cuda.is_available():
        return f"there is no CUDA device for torch {torch.__version__}"
    if os.environ.get("TRITON_INTERPRET") != "0":
        return "kernels are interpreted in this run; run python -m pytest -m gpu"
    return ""


WHY_NOT = why_not()
collect_ignore = [p.name for p in HERE.glob("test_*.py") if p.name != "test_device.py"] if WHY_NOT else []


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            # torch and its drivers warn of things that are not ours.
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("gpu")
    wanted = marker.args[0] if marker is not None and marker.args else 1
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    if torch.cuda.device_count() < wanted:
        pytest.skip(f"needs {wanted} CUDA devices; there are {torch.cuda.device_count()}")


@pytest.fixture(autouse=True)
def nothing_left_running():
    """A test ends when its kernels have, so that what one breaks is not blamed on the next."""
    yield
    if not WHY_NOT:
        torch.cuda.synchronize()

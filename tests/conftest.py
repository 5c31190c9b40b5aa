import gc
import os
import pathlib
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.name_service import use_no_name_server
from tests.programs import Programs
from tests.ranks import RankServer

GPU_TESTS = pathlib.Path(__file__).parent / "gpu"


def _wants_gpu(config):
    """Whether only tests that need a GPU are asked for: by their mark, or by their directory."""
    paths = [pathlib.Path(str(argument).split("::")[0]).absolute() for argument in config.args]
    in_directory = bool(paths) and all(GPU_TESTS in (path, *path.parents) for path in paths)
    return in_directory or config.getoption("markexpr").strip() == "gpu"


def pytest_configure(config):
    use_no_name_server()
    # Programs that tests start are no workers of this run; pytest-benchmark would refuse to time anything.
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    # A job in the background of a shell is started with Ctrl-C ignored, and tests send it to themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Once in a process, before Triton is imported: its kernels are compiled, or all of them interpreted.
    if _wants_gpu(config):
        # A queue for each stream, or ranks in streams would wait for a rank behind them.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1":
        from tests.quick_interpreter import use_quick_interpreter

        use_quick_interpreter()


def pytest_ignore_collect(collection_path, config):
    """With `-m gpu`, nothing else is imported: it would be compiled, and has never heard of it."""
    if config.getoption("markexpr").strip() != "gpu":
        return None
    is_needed = (
        GPU_TESTS in (collection_path, *collection_path.parents) or collection_path in GPU_TESTS.parents
    )
    return None if is_needed else True


def pytest_collection_finish():
    """Modules and tests stay to the end: no garbage collection need look at them again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(scope="session")
def rank_server():
    with RankServer() as server:
        yield server


@pytest.fixture
def on_ranks(rank_server):
    """Run a function on real processes: `on_ranks(world_size, fn, *args)`; see `RankServer.run`."""
    return rank_server.run


@pytest.fixture
def programs(rank_server, tmp_path):
    """Run Python programs without their imports; see `Programs`."""
    return Programs(rank_server, tmp_path)

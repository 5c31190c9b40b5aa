import contextlib
import functools
import os
import shutil
import tempfile

import pytest

from tests.faults import leaks
from tests.faults.worlds import Signals


def _in_directory(member, directory, fn, args):
    os.environ["TCOMM_SHM_DIR"] = directory
    return fn(member, *args)


@contextlib.contextmanager
def _private_directory():
    directory = tempfile.mkdtemp(prefix=leaks.PRIVATE_PREFIX, dir="/dev/shm")
    try:
        yield directory
        left = os.listdir(directory)
    finally:
        shutil.rmtree(directory)
    assert not left, f"names left in {directory}: {left}"


@pytest.fixture
def memory_directory():
    """A directory of our own in /dev/shm; whatever a test leaves in it is a leak."""
    with _private_directory() as directory:
        yield directory


@pytest.fixture
def world(rank_server, memory_directory):
    """As `on_ranks`, with the ranks' shared memory in `memory_directory`."""

    @functools.wraps(rank_server.run)
    def run(world_size, fn, *args, **options):
        return rank_server.run(world_size, _in_directory, memory_directory, fn, args, **options)

    return run


@pytest.fixture(scope="module")
def module_world(rank_server):
    """As `world`, for what several tests of a module look at."""

    def run(world_size, fn, *args, **options):
        with _private_directory() as directory:
            return rank_server.run(world_size, _in_directory, directory, fn, args, **options)

    return run


@pytest.fixture
def signals(tmp_path):
    directory = tmp_path / "signals"
    directory.mkdir()
    return Signals(str(directory))


def _nothing(member):
    return member.rank


@pytest.fixture(scope="module", autouse=True)
def _server_is_warm(rank_server):
    rank_server.run(1, _nothing)


@pytest.fixture(autouse=True)
def _all_as_before(_server_is_warm):
    names, before = leaks.shared_names(), leaks.Holdings.of_this_process()
    yield
    leaks.assert_as_before(before)
    leaks.assert_no_new_names(names)

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.ranks import RankServer


@pytest.fixture(scope="session")
def rank_server():
    with RankServer() as server:
        yield server


@pytest.fixture
def on_ranks(rank_server):
    """Run a function on real processes: `on_ranks(world_size, fn, *args)`; see `RankServer.run`."""
    return rank_server.run

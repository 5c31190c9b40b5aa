"""Launches over several nodes with NVSHMEM really linked, over a driver that only writes down."""

import pytest
import torch

from tcomm.kernels import nodes
from tcomm.kernels.hierarchical import hierarchical_all_gather, hierarchical_all_reduce
from tcomm.memory import nvshmem
from tcomm.memory.nvshmem_bitcode import find_bitcode
from tests.compile.node_launches import NODES, PES, WORLD, Library
from tests.compile.test_bound import FakeDriver, FakeLauncher, driver  # noqa: F401 - a fixture
from tests.compile_nvshmem import linked


@pytest.fixture
def loaded(driver, monkeypatch):  # noqa: F811
    """Binaries in the order in which they are loaded."""
    binaries, load = [], FakeDriver.load_binary

    def load_binary(self, name, kernel, *rest):
        binaries.append(kernel)
        return 900 + len(binaries), *load(self, name, kernel, *rest)[1:]

    monkeypatch.setattr(FakeDriver, "load_binary", load_binary)
    monkeypatch.setattr(nvshmem, "_use", nvshmem._Use())
    monkeypatch.setattr(nodes, "_modules", {})
    return binaries


def test_what_is_launched_has_nvshmem_linked_and_is_initialised_once(loaded):
    library = Library()
    arena = library.arena(find_bitcode(90))
    x, out = torch.ones(1000), torch.empty(WORLD, 1000)
    for _ in range(2):
        hierarchical_all_gather(x, arena, NODES, out=out, pes=PES)
        hierarchical_all_reduce(x, arena, NODES, out=torch.empty(1000), pes=PES)
    assert len(FakeLauncher.launched) == 4
    assert library.log == ["initialise 901", "initialise 902"]
    assert all(linked.DEVICE_STATE.encode() in binary for binary in loaded)
    for found in FakeLauncher.launched:
        assert (found.metadata.num_warps, found.metadata.maxnreg) == (8, nodes.NODES_MAX_REGISTERS)
        assert found.metadata.launch_cooperative_grid is True
    arena.close()
    assert library.log[2:] == ["free", "finalise 901", "finalise 902", "finalize"]

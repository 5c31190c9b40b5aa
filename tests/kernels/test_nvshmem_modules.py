import gc
from types import SimpleNamespace

import pytest

from tcomm.errors import CapabilityError
from tcomm.kernels.nvshmem_modules import DEVICE_STATE, NvshmemModules


class _Kernel:
    """What tcomm sees of a compiled kernel."""

    def __init__(self, linked=True, handle=17):
        self.asm = {"ptx": f".visible .const .b8 {DEVICE_STATE}[848];" if linked else ".entry k"}
        self.metadata = SimpleNamespace(name="k")
        self.module = None
        self.loads = 0
        self._handle = handle

    def _init_handles(self):
        self.loads += 1
        self.module = self._handle


class _Library:
    def __init__(self, status=None):
        self.status = status
        self.log = []
        self.modules = NvshmemModules(self._init, lambda module: self.log.append(("finalize", module)))

    def _init(self, module):
        self.log.append(("init", module))
        return self.status


@pytest.mark.parametrize("status", [None, 0])
def test_a_module_is_loaded_and_initialised_once_and_finalised_once(status):
    library, kernel = _Library(status), _Kernel()
    assert library.modules.initialise(kernel)
    assert library.modules.initialise(kernel)
    assert kernel.loads == 1
    library.modules.finalise()
    library.modules.finalise()
    assert library.log == [("init", 17), ("finalize", 17)]


def test_a_module_that_triton_has_loaded_is_not_loaded_again():
    library, kernel = _Library(), _Kernel()
    kernel.module = 4
    assert library.modules.initialise(kernel)
    assert (kernel.loads, library.log) == (0, [("init", 4)])


def test_a_kernel_without_nvshmem_is_left_alone():
    library, kernel = _Library(), _Kernel(linked=False)
    assert not library.modules.initialise(kernel)
    assert (kernel.loads, library.log) == (0, [])


def test_a_refusal_is_an_error_each_time():
    library, kernel = _Library(status=3), _Kernel()
    for _ in range(2):
        with pytest.raises(CapabilityError, match=r"cannot initialise the module of k \(status 3\)"):
            library.modules.initialise(kernel)
    assert len(library.log) == 2


def test_kernels_that_are_gone_are_forgotten():
    library = _Library()
    library.modules.initialise(_Kernel())
    gc.collect()
    library.modules.finalise()
    assert library.log == [("init", 17)]

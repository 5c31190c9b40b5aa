"""Run by `test_launcher.py` where libcuda is `libcuda.c`: bound calls through Triton's own launcher."""

import ctypes
import os
import pathlib
import sys
import types

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver

from tcomm import VirtualRanks
from tcomm.kernels import partition
from tcomm.memory.base import LaunchPart
from tests.virtual_worlds import CASES, call, length_of

WORLD = 4


class Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint64 * 3), ("block", ctypes.c_uint64 * 3), ("stream", ctypes.c_uint64),
        ("cooperative", ctypes.c_uint64), ("function", ctypes.c_uint64), ("num_attrs", ctypes.c_uint64),
        ("params", ctypes.c_uint64 * 16),
    ]  # fmt: skip


def use_stub():
    """Triton's driver, whose device is an H100 that torch knows nothing of."""
    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device: (9, 0)
    triton.runtime.driver.set_active(driver)
    make_table = partition._make_table
    partition._make_table = lambda parts, size, _: make_table(parts, size, torch.device("cpu"))
    return ctypes.CDLL(str(pathlib.Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1"))


def main():
    stub = use_stub()
    launches = (Launch * 64).in_dll(stub, "launches")
    num_launches = ctypes.c_int.in_dll(stub, "num_launches")
    num_params = ctypes.c_int.in_dll(stub, "num_params")
    for mode in ("grid", "streams"):
        for verb, algorithm in CASES if mode == "grid" else CASES[:1]:
            ranks = VirtualRanks(WORLD, "cpu", staging_bytes=1 << 20, mode=mode, timeout=2.5)
            ranks.arena.device = torch.device("cuda", 0)
            if mode == "streams":
                handles = [types.SimpleNamespace(cuda_stream=100 + rank) for rank in range(WORLD)]
                ranks.arena.launch_parts = tuple(LaunchPart(r, 1, s) for r, s in enumerate(handles))
            numel = length_of(verb, 1000, WORLD)
            # x, out, two strides, numel or parts, two tables, signature, rank, budget.
            num_params.value = 10
            for _ in range(2):
                before, x = num_launches.value, ranks.empty(numel, dtype=torch.bfloat16)
                out = call(ranks, verb, algorithm, x, root=1)
                made = [launches[i % 64] for i in range(before, num_launches.value)]
                for rank, launch in enumerate(made):
                    check(ranks, launch, x, out, mode, rank, numel if verb == "all_reduce" else None)
                assert len(made) == (1 if mode == "grid" else WORLD)
    sys.stdout.write(f"launched {num_launches.value}\n")


def check(ranks, launch, x, out, mode, rank, numel):
    low = (1 << 32) - 1
    arena, params = ranks.arena, list(launch.params)
    assert list(launch.grid) == [1, WORLD if mode == "grid" else 1, 1]
    assert list(launch.block) == [256, 1, 1]
    assert launch.cooperative == (1 if mode == "grid" else 0)
    assert launch.num_attrs == launch.cooperative
    assert launch.stream == (0 if mode == "grid" else 100 + rank)
    assert launch.function == 4096
    assert params[:2] == [x.data_ptr(), out.data_ptr()]
    assert [params[2] & low, params[3] & low] == [x.stride(0), out.stride(0)]
    assert numel is None or params[4] & low == numel
    assert params[5:7] == [arena.staging.buffer.table.data_ptr(), arena.control.table.data_ptr()]
    assert params[7] < 1 << 32
    assert params[8] & low == rank
    assert params[9] == 2_500_000_000


if __name__ == "__main__":
    main()

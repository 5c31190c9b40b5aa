"""All-reduce among processes, timed: torch's symm_mem, NCCL, and tcomm on GPUs of their own.

    python -m perf.gpu.peers --impl symm_mem_one_shot --world 1 --sizes 1024,65536

Prints a line of JSON for each figure, or one with the reason why there is none.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import queue
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

DTYPE = torch.bfloat16
REPLAYS, EAGER_CALLS = 20, 50
SECONDS = 40.0
IMPLS = ("symm_mem_one_shot", "symm_mem_two_shot", "nccl", "nccl_symmetric", "tcomm")
_Ready = tuple[torch.Tensor, Callable[[], Any]]


def _symm_mem(op: str, numel: int) -> _Ready:
    import torch.distributed._symmetric_memory as symm_mem

    x = symm_mem.empty(numel, dtype=DTYPE, device=torch.device("cuda", torch.cuda.current_device()))
    group = dist.group.WORLD.group_name
    symm_mem.rendezvous(x, group)
    call = getattr(torch.ops.symm_mem, op)
    return x, lambda: call(x, "sum", group)


def _nccl(numel: int, symmetric: bool) -> _Ready:
    if not symmetric:
        x = torch.empty(numel, dtype=DTYPE, device="cuda")
    else:
        backend = dist.group.WORLD._get_backend(torch.device("cuda"))
        pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.cuda.use_mem_pool(pool):
            x = torch.empty(numel, dtype=DTYPE, device="cuda")
        backend.register_mem_pool(pool, symm=True)
        # As long as x lives.
        _pools.append(pool)

    def run() -> torch.Tensor:
        dist.all_reduce(x)
        return x

    return x, run


_pools: list[Any] = []


def _tcomm(comm: Any, numel: int) -> _Ready:
    x = torch.empty(numel, dtype=DTYPE, device="cuda")
    out = torch.empty_like(x)
    return x, lambda: comm.all_reduce(x, out=out)


def _make(impl: str, numel: int, comm: Any) -> _Ready:
    if impl == "tcomm":
        return _tcomm(comm, numel)
    if impl.startswith("nccl"):
        return _nccl(numel, impl == "nccl_symmetric")
    op = {"symm_mem_one_shot": "one_shot_all_reduce", "symm_mem_two_shot": "two_shot_all_reduce_"}[impl]
    return _symm_mem(op, numel)


def _figures(impl: str, rank: int, world: int, nbytes: int, comm: Any) -> dict[str, Any]:
    from perf.gpu.device import CudaDevice
    from tcomm.tuning.measure import percentiles

    device, note = CudaDevice(), ""
    x, run = _make(impl, nbytes // DTYPE.itemsize, comm)
    x.fill_(rank + 1)
    torch.cuda.synchronize()
    dist.barrier()
    result = run()
    torch.cuda.synchronize()
    if not bool((result == world * (world + 1) // 2).all()):
        note = "WRONG result"
    x.zero_()
    calls = 20 if nbytes <= 1 << 20 else 4
    eager, graphs = [], []
    for _ in range(5):
        dist.barrier()
        eager.append(device.seconds(lambda: [run() for _ in range(EAGER_CALLS)]) * 1e6 / EAGER_CALLS)
    try:
        replay = device.capture(run, calls)
        for index in range(REPLAYS + 3):
            dist.barrier()
            micros = device.seconds(replay) * 1e6 / calls
            graphs += [micros] if index >= 3 else []
    except RuntimeError as error:
        note = f"{note} no graph: {str(error).splitlines()[0]}".strip()
    mine = (percentiles(graphs).median_us if graphs else None, percentiles(eager).median_us)
    every: list[Any] = [None] * world
    dist.all_gather_object(every, mine)
    slowest = [None if any(t[i] is None for t in every) else max(t[i] for t in every) for i in (0, 1)]
    return {
        "what": impl, "world": world, "nbytes": nbytes, "graph_us": slowest[0], "eager_us": slowest[1],
        "note": note,
    }  # fmt: skip


def _serve(found: Any, impl: str, rank: int, world: int, devices: int, port: int, sizes: list[int]) -> None:
    try:
        torch.cuda.set_device(rank % devices)
        limit = datetime.timedelta(seconds=SECONDS)
        store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=limit)
        # NCCL refuses two ranks on one device.
        backend = "cpu:gloo,cuda:nccl" if world <= devices else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        comm = None
        if impl == "tcomm":
            import tcomm

            comm = tcomm.Communicator(timeout=20.0)
            comm.prepare(max(sizes), [DTYPE])
        for nbytes in sizes:
            found.put((rank, _figures(impl, rank, world, nbytes, comm)))
        found.put((rank, None))
        dist.barrier()
    except BaseException as error:  # noqa: BLE001 - the reason is what is wanted of it
        text = " ".join(str(error).split())[:600]
        found.put((rank, {"what": impl, "reason": f"{world} ranks: {type(error).__name__}: {text}"}))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--impl", choices=IMPLS, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--sizes", default="1024,16384,262144,1048576,16777216")
    arguments = parser.parse_args()
    devices = torch.cuda.device_count()
    if devices == 0:
        print(json.dumps({"what": arguments.impl, "reason": "there is no CUDA device"}))
        return 0
    if arguments.world > devices:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    sizes = [int(size) for size in arguments.sizes.split(",")]
    context = multiprocessing.get_context("spawn")
    found, port = context.Queue(), _free_port()
    processes = [
        context.Process(
            target=_serve, args=(found, arguments.impl, rank, arguments.world, devices, port, sizes)
        )
        for rank in range(arguments.world)
    ]
    for process in processes:
        process.start()
    _print_until_done(found, arguments.world, arguments.impl)
    for process in processes:
        process.join(5)
        process.kill()
    return 0


def _print_until_done(found: Any, world: int, impl: str) -> None:
    """What rank 0 found, and the first reason that any rank gives for having ended."""
    done = 0
    while done < world:
        try:
            rank, figures = found.get(timeout=SECONDS)
        except queue.Empty:
            reason = f"{world} ranks: no word for {SECONDS:.0f} s"
            print(json.dumps({"what": impl, "reason": reason}), flush=True)
            return
        if figures is None:
            done += 1
        elif "reason" in figures:
            print(json.dumps(figures), flush=True)
            return
        elif rank == 0:
            print(json.dumps(figures), flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    raise SystemExit(main())

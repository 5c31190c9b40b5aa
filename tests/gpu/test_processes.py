"""Real processes with real communicators: two on one device, and one on each of two or more."""

import datetime
import multiprocessing
import os
import traceback

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tcomm import reference
from tests.test_reference import difference, every_ranks_input

pytestmark = [pytest.mark.timeout(180)]
SIZES = (1, 1001, 100_000)


def _use(rank, world):
    import tcomm
    from tcomm.kernels.bound import launches

    comm = tcomm.Communicator(timeout=60.0)
    wrong = []
    for seed, numel in enumerate(SIZES * 3):
        inputs = every_ranks_input(seed, world, (numel,), torch.float32)
        got = comm.all_reduce(inputs[rank].cuda()).cpu()
        wrong.append(difference(got, reference.all_reduce(inputs)[rank]))
        rows = comm.all_gather_single(inputs[rank].cuda()).cpu()
        wrong.append(difference(rows, torch.cat(inputs)))
    chosen = comm.explain("all_reduce", nbytes=4096, device="cuda").algorithm
    if not chosen.startswith("triton:") or not launches.total():
        wrong.append(f"kernels were to be launched: {comm.explain('all_reduce', nbytes=4096, device='cuda')}")
    comm.close()
    wrong += _move_experts(rank, world)
    return [each for each in wrong if each], chosen


def _move_experts(rank, world):
    """What is wrong after experts went to and fro between two maps, in memory that the ranks share."""
    from tcomm.eplb.migration import migration
    from tcomm.eplb.moving import make_mover
    from tcomm.eplb.moving.symmetric import SymmetricMover

    slots = 4 * world
    old = np.arange(slots)[None] % (slots - 2)
    maps = old, np.roll(old, 3, axis=1)
    mine = slice(4 * rank, 4 * rank + 4)
    held = [torch.from_numpy(phy2log[0, mine]) for phy2log in maps]
    weight = held[0].cuda()[:, None].repeat(1, 100_003)
    mover = make_mover(dist.group.WORLD, [weight], timeout=60.0)
    wrong = [] if isinstance(mover, SymmetricMover) else [f"experts moved by {type(mover).__name__}"]
    for turn in range(6):
        before, after = maps[turn % 2], maps[1 - turn % 2]
        moves = migration(before, after, world).layers[0]
        mover.prepare(0, moves, [weight])
        mover.commit(0, moves, [weight])
        if not torch.equal(weight.cpu(), held[1 - turn % 2][:, None].expand_as(weight)):
            wrong.append(f"experts are not where turn {turn} put them")
    mover.close()
    return wrong


def _serve(queue, rank, world, port, devices):
    try:
        torch.cuda.set_device(rank % devices)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        limit = datetime.timedelta(seconds=90)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        queue.put((rank, _use(rank, world)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, traceback.format_exc()))


def _run(world, devices, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if world > devices:
        monkeypatch.setenv("TCOMM_ALLOW_SHARED_DEVICE", "1")
    else:
        monkeypatch.delenv("TCOMM_ALLOW_SHARED_DEVICE", raising=False)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    args = [(queue, rank, world, store.port, devices) for rank in range(world)]
    processes = [context.Process(target=_serve, args=each) for each in args]
    for process in processes:
        process.start()
    try:
        found = dict(queue.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    assert os.environ["TRITON_INTERPRET"] == "0"
    for rank in range(world):
        assert not isinstance(found[rank], str), f"rank {rank}: {found[rank]}"
        wrong, chosen = found[rank]
        assert wrong == [], f"rank {rank}, {chosen}"


@pytest.mark.gpu(1)
def test_two_processes_on_one_device(monkeypatch):
    _run(2, 1, monkeypatch)


@pytest.mark.gpu(2)
def test_a_process_on_each_device(monkeypatch):
    count = min(torch.cuda.device_count(), 8)
    _run(count, count, monkeypatch)

"""F17: fifty groups at once under a limit of 1024 descriptors."""

import os
import resource
import threading

import torch
import torch.distributed as dist

from tcomm.groups.stateless.addresses import bind_listen_socket
from tcomm.groups.stateless.gloo import (
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from tcomm.groups.stateless.group import StatelessProcessGroup
from tests.faults.meeting import create

NUM_GROUPS = 50
NUM_PORTS = 20


def _num_files():
    return len(os.listdir("/proc/self/fd"))


def _at_once(make, order):
    """What `make(number)` gave for each number, each in a thread of its own."""
    made, errors = {}, []

    def run(number):
        try:
            made[number] = make(number)
        except Exception as error:
            errors.append(f"{number}: {error}")

    threads = [threading.Thread(target=run, args=(number,)) for number in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return made


def _many(member):
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    rank, size = member.rank, member.world_size
    first = create(member, rank, size, "first")
    port = int(member.store.get("port"))
    order = range(NUM_GROUPS) if rank == 0 else reversed(range(NUM_GROUPS))
    order, begin, used = list(order), _num_files(), {}

    def at_one_address(number):
        group = create(member, rank, size, f"g{number}", 60.0)
        assert group.all_gather_obj((rank, number)) == [(r, number) for r in range(size)]
        return group

    def gloo_at_one_address(number):
        pg = stateless_init_torch_distributed_process_group(
            "127.0.0.1", port, rank, size, "gloo", group_name=f"t{number}", timeout=60
        )
        x = torch.full((4,), float(number))
        dist.all_reduce(x, group=pg)
        assert x.tolist() == [size * number] * 4
        return pg

    def at_its_own_port(number):
        listening = sockets[number] if rank == 0 else None
        group = StatelessProcessGroup.create(
            "127.0.0.1", ports[number], rank, size, store_timeout=60, listen_socket=listening
        )
        assert group.all_gather_obj((rank, number)) == [(r, number) for r in range(size)]
        return group

    groups = _at_once(at_one_address, order)
    used["one address"] = _num_files() - begin
    first.barrier()
    groups.clear()
    begin = _num_files()
    groups = _at_once(gloo_at_one_address, order)
    used["gloo"] = _num_files() - begin
    first.barrier()
    for pg in groups.values():
        stateless_destroy_torch_distributed_process_group(pg)
    groups.clear()
    first.barrier()
    begin = _num_files()
    # Bound before anybody is told, and handed over: the ports cannot be anybody else's.
    sockets = [bind_listen_socket("127.0.0.1") for _ in range(NUM_PORTS)] if rank == 0 else []
    ports = first.broadcast_obj([s.getsockname()[1] for s in sockets], 0)
    groups = _at_once(at_its_own_port, range(NUM_PORTS))
    used["own ports"] = _num_files() - begin
    first.barrier()
    return used


def test_f17_fifty_groups_at_once_do_not_collide(world):
    served, joined = world(2, _many, timeout=100.0)
    assert max(served["one address"], joined["one address"]) <= 2
    assert served["gloo"] <= 5 * NUM_GROUPS
    assert joined["gloo"] <= 3 * NUM_GROUPS
    assert served["own ports"] <= 11 * NUM_PORTS
    assert joined["own ports"] <= 2 * NUM_PORTS

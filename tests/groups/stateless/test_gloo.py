import datetime
import os
import pathlib
import socket
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

import tcomm
from tcomm.errors import CapabilityError, ConfigError, PeerTimeoutError
from tcomm.groups.stateless.addresses import bind_listen_socket
from tcomm.groups.stateless.cpu_all_reduce import cpu_all_reduce_
from tcomm.groups.stateless.gloo import (
    init_gloo_process_group,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from tcomm.groups.stateless.same_node import in_the_same_node_as


def own_listening_addresses():
    """Local addresses at which this process listens, as /proc writes them."""
    inodes = set()
    for entry in pathlib.Path("/proc/self/fd").iterdir():
        try:
            inodes.add(os.readlink(entry))
        except OSError:
            continue
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in pathlib.Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
    ]
    return {f[1].split(":")[0] for f in lines if f[3] == "0A" and f"socket:[{f[9]}]" in inodes}


def _handed_over(member):
    """A socket of rank 0, and the port of it for the others."""
    if member.rank:
        port, listening = int(member.store.get("port")), None
    else:
        listening = bind_listen_socket("127.0.0.1")
        port = listening.getsockname()[1]
        member.store.set("port", str(port))
    return "127.0.0.1", port, member.rank, member.world_size, listening


def _use(member):
    host, port, rank, world_size, listening = _handed_over(member)
    pg, store = stateless_init_torch_distributed_process_group(
        host, port, rank, world_size, "gloo",
        listen_socket=listening, timeout=20, return_store=True, group_name="by name",
    )  # fmt: skip
    assert own_listening_addresses() <= {"0100007F"}
    x = torch.full((3,), float(rank))
    dist.all_reduce(x, group=pg)
    y = cpu_all_reduce_(torch.full((2,), rank), pg, timeout=20)
    with tcomm.Communicator.from_store(store, rank, world_size, name="on it", timeout=20.0) as comm:
        z = comm.all_reduce(torch.ones(2))
    second = stateless_init_torch_distributed_process_group(host, port, rank, world_size, "gloo", timeout=20)
    dist.all_reduce(x, group=second)
    told = {
        "place": (pg.rank(), pg.size(), pg.group_name),
        "initialised": dist.is_initialized(),
        "by name": _resolve_process_group("by name").size(),
        "nodes": in_the_same_node_as(pg, 1),
        "sums": (x.tolist(), y.tolist(), z.tolist()),
    }
    member.meet("used")
    for group in (pg, second, pg):
        stateless_destroy_torch_distributed_process_group(group)
    with pytest.raises(RuntimeError):
        _resolve_process_group("by name")
    del pg, store, second, group
    if rank == 0:
        # The last group there has gone, and the store with it.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), 5.0)
    member.meet("looked")
    return told


def test_a_group_that_torch_does_not_know_of_works(on_ranks):
    for rank, told in enumerate(on_ranks(2, _use)):
        assert told == {
            "place": (rank, 2, "by name"),
            "initialised": False,
            "by name": 2,
            "nodes": [True, True],
            "sums": ([2.0] * 3, [1, 1], [2.0, 2.0]),
        }


def test_alone_it_needs_no_address():
    pg = stateless_init_torch_distributed_process_group("127.0.0.1", 0, 0, 1, "gloo", timeout=5)
    x = torch.ones(2)
    dist.all_reduce(x, group=pg)
    assert x.tolist() == [1.0, 1.0]
    stateless_destroy_torch_distributed_process_group(pg)


def test_what_is_wrong_is_refused_before_anybody_waits(monkeypatch):
    with pytest.raises(CapabilityError, match="backend 'nccl': a stateless process group is made of 'gloo'"):
        stateless_init_torch_distributed_process_group("127.0.0.1", 1, 0, 2, "nccl")
    with pytest.raises(ConfigError, match="rank 2 of 2 ranks"):
        stateless_init_torch_distributed_process_group("127.0.0.1", 1, 2, 2, "gloo")
    monkeypatch.delenv("TCOMM_SECRET", raising=False)
    monkeypatch.delenv("VLLM_SECRET", raising=False)
    with pytest.raises(ConfigError, match="set TCOMM_SECRET"):
        stateless_init_torch_distributed_process_group("192.0.2.1", 1, 0, 2, "gloo")


def test_gloo_over_a_store(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store, sums = dist.HashStore(), {}

    def run(rank):
        pg = init_gloo_process_group(dist.PrefixStore("g", store), rank, 2, datetime.timedelta(seconds=20))
        x = torch.full((2,), float(rank))
        dist.all_reduce(x, group=pg)
        sums[rank] = (x.tolist(), pg.rank(), pg.size())

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == {0: ([1.0, 1.0], 0, 2), 1: ([1.0, 1.0], 1, 2)}
    assert not dist.is_initialized()


def test_gloo_gives_up_on_a_rank_that_does_not_come(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.PrefixStore("g", dist.HashStore())
    with pytest.raises(
        PeerTimeoutError, match=r"gloo did not connect rank 0 to the others of 2 within 0\.3 s"
    ):
        init_gloo_process_group(store, 0, 2, datetime.timedelta(seconds=0.3))

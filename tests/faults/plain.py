"""A rank that is a program of its own: `python -m tests.faults.plain PORT KEY DIRECTORY HOW`."""

from __future__ import annotations

import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist

from tcomm import Communicator

RANK, WORLD_SIZE = 1, 2
_kept = []


def store_of(port: int, key: str) -> dist.Store:
    """The store of one test's ranks."""
    limit = datetime.timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=limit)
    return dist.PrefixStore(key, store)


def main(port: str, key: str, directory: str, how: str) -> None:
    # A shell that starts the tests in its background has its children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["TCOMM_SHM_DIR"] = directory
    torch.set_num_threads(1)
    comm = Communicator.from_store(store_of(int(port), key), RANK, WORLD_SIZE, name="test", timeout=20.0)
    _kept.append(comm)
    x = torch.arange(4.0) + RANK
    comm.all_reduce(x)
    if how == "raise":
        raise ValueError("boom")
    if how == "exit":
        sys.exit("enough")
    if how == "loop":
        while True:
            comm.all_reduce(x)


if __name__ == "__main__":
    main(*sys.argv[1:])

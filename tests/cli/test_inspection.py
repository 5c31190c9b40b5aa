import os
import time

import torch

from tcomm.cli import inspection
from tcomm.cli.inspection import inspect_process
from tcomm.memory.control import CONTROL_BYTES, LAYOUT_VERSION, ControlPage, Word


def _hang(member, directory):
    comm = member.communicator()
    comm.barrier()
    if member.rank == 0:
        open(f"{directory}/{os.getpid()}", "w").close()
    else:
        deadline = time.monotonic() + 20
        while "seen" not in os.listdir(directory) and time.monotonic() < deadline:
            time.sleep(0.01)
    comm.barrier()


def test_a_third_process_sees_whom_a_hanging_rank_waits_for(on_ranks, tmp_path):
    seen = []

    def look(processes):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not seen:
            for name in os.listdir(tmp_path):
                groups = inspect_process(int(name))
                seen.extend(group for group in groups if group["waiting for rank"] is not None)
            time.sleep(0.01)
        open(tmp_path / "seen", "w").close()

    on_ranks(2, _hang, str(tmp_path), during=look)
    assert seen[0]["waiting for rank"] == 1
    assert (seen[0]["rank"], seen[0]["world_size"], seen[0]["completed"]) == (0, 2, 1)
    assert seen[0]["last call"] == "barrier via cpu:arrival"
    assert seen[0]["state"] == "healthy"


def test_a_page_of_another_layout_is_said_to_be_one_and_not_read(tmp_path):
    memory = torch.zeros(CONTROL_BYTES, dtype=torch.uint8)
    page = ControlPage(memory)
    page.initialise(rank=1, world_size=2, nonce=5, pid=6, start_time=7)
    path = tmp_path / "page"
    path.write_bytes(page.bytes)
    assert inspection._status(path)["state"] == "healthy"
    page.words[Word.LAYOUT_VERSION] += 1
    path.write_bytes(page.bytes)
    state = f"not read: its page has layout {LAYOUT_VERSION + 1}, and that of this tcomm {LAYOUT_VERSION}"
    assert inspection._status(path) == {"state": state}
    page.words[Word.MAGIC] = 0
    path.write_bytes(page.bytes)
    assert inspection._status(path) is None

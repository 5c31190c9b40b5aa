import os
import time

from tcomm.cli.inspection import inspect_process


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

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tcomm.cli import workers
from tcomm.cli.rank import write_whole
from tcomm.cli.workers import Ranks, run_ranks, why_no_mpi
from tcomm.errors import CommError, ConfigError
from tests.cli import jobs

without_mpi = pytest.mark.skipif(bool(why_no_mpi()), reason=why_no_mpi() or "there is MPI")


def _is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for_end_of(pid):
    deadline = time.monotonic() + 20
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _is_running(pid)


@pytest.mark.parametrize("mpi", [False, pytest.param(True, marks=without_mpi)], ids=["ours", "mpirun"])
def test_the_same_ranks_serve_every_call_and_end_with_the_group(mpi):
    with Ranks(2, mpi=mpi, pin=True, timeout=60.0) as ranks:
        first, second = (ranks.run(jobs.add, 10, b, timeout=60.0) for b in (1, 2))
    assert [first["total"], second["total"]] == [12, 14]
    assert first["pid"] == second["pid"]
    assert len(first["cores"]) == 1
    assert _wait_for_end_of(first["pid"])


def test_a_failure_names_the_rank_and_the_reason_once(forked_ranks):
    with pytest.raises(CommError, match=r"(?s)rank 1: Traceback.*ValueError: rank 1 does not like it"):
        run_ranks(2, jobs.fail_on_rank_1, timeout=60.0)
    written = [path.read_text() for path in forked_ranks.glob("rank-*.err")]
    assert len(written) == 2
    assert "Traceback" not in "".join(written)


def test_an_error_of_tcomm_in_a_rank_is_a_sentence(forked_ranks):
    with pytest.raises(CommError, match=r"a rank failed: rank 0: CapabilityError: not that$"):
        run_ranks(1, jobs.refuse, timeout=60.0)


def test_nobody_who_looks_for_a_file_sees_it_half_written(monkeypatch, tmp_path):
    seen, rename = [], pathlib.Path.rename

    def look_and_rename(part, path):
        seen.extend([*tmp_path.glob("error-*"), part.read_bytes()])
        return rename(part, path)

    monkeypatch.setattr(pathlib.Path, "rename", look_and_rename)
    write_whole(tmp_path / "error-rank 1", b"why")
    assert seen == [b"why"]
    assert [path.name for path in tmp_path.iterdir()] == ["error-rank 1"]
    assert (tmp_path / "error-rank 1").read_bytes() == b"why"


@pytest.mark.parametrize(
    ("world_size", "mpi"), [(1, False), (2, False), pytest.param(2, True, marks=without_mpi)]
)
def test_a_rank_that_vanishes_ends_the_call(forked_ranks, world_size, mpi):
    with pytest.raises(CommError, match="a rank failed"):
        run_ranks(world_size, jobs.exit_on_the_last_rank, timeout=30.0, mpi=mpi)


def test_the_deadline_ends_ranks_that_are_busy(forked_ranks):
    started = time.monotonic()
    with pytest.raises(CommError, match=r"were not done after 0\.3 s"):
        run_ranks(1, jobs.sleep, timeout=0.3)
    assert time.monotonic() - started < 30


def test_ranks_end_and_tidy_up_when_their_parent_was_killed(tmp_path):
    code = (
        "from tcomm.cli.workers import Ranks; from tests.cli import jobs; "
        "r = Ranks(1, timeout=60.0); print(r.run(jobs.add, 1, 1, timeout=60.0)['pid'], flush=True); "
        "import time; time.sleep(60)"
    )
    settings = dict(os.environ, TMPDIR=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=settings
    ) as parent:
        rank = int(parent.stdout.readline())
        assert list(tmp_path.glob("tcomm-*"))
        os.kill(parent.pid, signal.SIGKILL)
    assert _wait_for_end_of(rank)
    assert list(tmp_path.glob("tcomm-*")) == []


def test_without_mpirun_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(workers.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="no MPI: there is no mpirun on the PATH"):
        Ranks(2, mpi=True, timeout=1.0)


def test_without_mpi4py_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(workers.shutil, "which", lambda name: "/bin/true")
    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: None)
    assert why_no_mpi() == "mpi4py is not installed; it comes with tcomm[mpi]"

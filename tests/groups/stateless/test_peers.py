import os
import pathlib
import subprocess

import msgspec
import pytest

from tcomm.groups.stateless import peers
from tcomm.groups.stateless.peers import describe_process, is_running
from tcomm.memory.liveness import my_identity


def _elsewhere():
    return msgspec.structs.replace(my_identity(), namespace="another host/1")


def test_a_process_runs_until_it_has_ended():
    with subprocess.Popen(["sleep", "60"]) as process:
        before = len(os.listdir("/proc/self/fd"))
        start = int(pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        identity = msgspec.structs.replace(my_identity(), pid=process.pid, start_time=start)
        assert is_running(identity) is True
        assert describe_process(identity) == f"pid {process.pid}, running"
        process.kill()
        while is_running(identity):
            pass
        assert describe_process(identity).startswith(f"pid {process.pid}, killed by SIGKILL")
        assert len(os.listdir("/proc/self/fd")) == before
        later = msgspec.structs.replace(my_identity(), start_time=1)
        assert is_running(later) is False


@pytest.mark.parametrize("reason", ["namespace", "no pidfd"])
def test_of_a_process_that_cannot_be_watched_nothing_is_known(reason, monkeypatch):
    if reason == "no pidfd":
        monkeypatch.setattr(peers.os, "pidfd_open", lambda pid: os.open("/none", os.O_RDONLY))
    identity = _elsewhere() if reason == "namespace" else my_identity()
    assert is_running(identity) is None
    assert describe_process(identity) == f"pid {os.getpid()} elsewhere"

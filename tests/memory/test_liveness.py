import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from tcomm.memory import liveness
from tcomm.memory.liveness import PeerProcess, hold_lock, is_locked, my_identity


@dataclasses.dataclass
class _Child:
    """A process that holds the lock of a file until it is told to end."""

    process: subprocess.Popen
    watch: PeerProcess


_HOLD = """
import os, runpy, sys
import msgspec
liveness = runpy.run_path(sys.argv[2])  # without the rest of tcomm, which is long to import
fd = os.open(sys.argv[1], os.O_RDWR)
liveness["hold_lock"](fd)
os.close(os.open(sys.argv[1], os.O_RDWR))  # must not drop the lock
print(msgspec.json.encode(liveness["my_identity"]()).decode(), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(params=["pidfd", "lock"])
def child(request, tmp_path):
    path = tmp_path / "lock"
    path.touch()
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path), liveness.__file__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    identity = msgspec.json.decode(process.stdout.readline(), type=type(my_identity()))
    if request.param == "lock":
        identity = msgspec.structs.replace(identity, namespace="another machine/1")
    watch = PeerProcess(identity, os.open(path, os.O_RDWR))
    yield _Child(process, watch)
    watch.close()
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def _dies(watch):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if watch.is_dead():
            return True
        time.sleep(0.005)
    return False


def test_a_process_is_alive_until_it_is_killed(child):
    assert not child.watch.is_dead()
    child.process.kill()
    assert _dies(child.watch)
    child.process.wait()
    assert child.watch.is_dead()


def test_a_process_that_ends_by_itself_is_dead(child):
    child.process.stdin.write("\n")
    child.process.stdin.flush()
    assert _dies(child.watch)


def test_a_stopped_process_is_not_dead(child):
    child.process.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    assert not child.watch.is_dead()
    described = child.watch.describe()
    child.process.send_signal(signal.SIGCONT)
    pid = child.process.pid
    assert described in {f"pid {pid}, stopped by a signal", f"pid {pid} in another pid namespace"}


@pytest.mark.parametrize("child", ["pidfd"], indirect=True)
def test_how_a_process_ended_is_told_where_it_is_known(child):
    child.process.kill()
    assert _dies(child.watch)
    assert child.watch.describe() == f"pid {child.process.pid}, killed by SIGKILL"
    child.process.wait()
    assert child.watch.describe() == f"pid {child.process.pid}, gone"


def test_descriptors_are_given_back_once(child):
    before = len(os.listdir("/proc/self/fd"))
    child.watch.close()
    child.watch.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_a_pid_that_was_given_to_another_process_is_a_dead_one(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    older = msgspec.structs.replace(my_identity(), start_time=my_identity().start_time - 1)
    watch = PeerProcess(older, os.open(path, os.O_RDWR))
    assert watch.is_dead()
    watch.close()


def test_a_pid_that_nobody_has_is_a_dead_one(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = tmp_path / "lock"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    watch = PeerProcess(msgspec.structs.replace(my_identity(), pid=ended.pid, start_time=1), fd)
    assert watch.is_dead()
    watch.close()


def test_a_lock_is_seen_by_others_and_not_by_its_holder(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    mine, other = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
    assert not is_locked(other)
    hold_lock(mine)
    assert is_locked(other)
    assert not is_locked(mine)
    os.close(mine)
    assert not is_locked(other)
    os.close(other)


def test_an_identity_is_of_this_process():
    identity = my_identity()
    assert identity.pid == os.getpid()
    assert identity.start_time > 0
    assert identity == my_identity()


def test_two_threads_may_ask_at_once():
    """A poll object refuses that, and the watch of a GPU's waits asks beside everybody else."""
    process = PeerProcess(my_identity(), os.open("/dev/null", os.O_RDONLY))
    failures = []

    class Poll:
        asking = False

        def poll(self, timeout):
            if self.asking:
                failures.append("concurrent poll() invocation")
            self.asking = True
            time.sleep(0.001)
            self.asking = False
            return []

    process._poll = Poll()

    def ask():
        for _ in range(20):
            assert not process.is_dead()

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.close()
    assert failures == []

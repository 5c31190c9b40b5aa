import contextlib
import os
import pickle
import resource
import socket
import threading
import time

import numpy as np

from tcomm.errors import DecodeError, PeerTimeoutError
from tcomm.objects.codec import decode, encode
from tcomm.objects.listener import FrameListener, connect_frames
from tests.faults.worlds import failure_of, group, reduce_ones

CAP = 1 << 20
GROWTH_KIB = 16 << 10
"""Less than a thousandth of what the hostile lengths ask for."""


class _Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def _hostile(mark):
    """What comes over the socket, from others than this job's processes."""
    attack = pickle.dumps(_Attack(mark))
    return [
        b"",
        attack,
        b"tcommF1\n" + bytes(32) + attack.ljust(32, b"."),
        b"\xff" * 8 + attack,
        (1 << 40).to_bytes(8, "little") + bytes(32),
        b"tcommF1\n" + bytes(20),
        *(os.urandom(size) for size in (1, 39, 40, 72, 5000, 300_000)),
    ]


def _soon(seconds=20.0):
    return time.monotonic() + seconds


@contextlib.contextmanager
def _serving(listener):
    """A thread that lets in whoever belongs here, until the block ends."""
    accepted, ended = [], threading.Event()

    def serve():
        while not ended.is_set():
            with contextlib.suppress(PeerTimeoutError):
                accepted.append(listener.accept(_soon(0.05)))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield accepted
    finally:
        ended.set()
        thread.join()
        for connection in accepted:
            connection.close()


def _listen(member, mark):
    count = len(_hostile(mark))
    with group(member) as comm, FrameListener("127.0.0.1") as listener, _serving(listener) as accepted:
        member.store.set("port", str(listener.address[1]))
        reduce_ones(comm)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(count):
            reduce_ones(comm)
        deadline = _soon()
        while (listener.refused < count or len(accepted) < 2) and time.monotonic() < deadline:
            time.sleep(0.01)
        comm.barrier()
        first, second = accepted
        too_large = failure_of(first.receive, CAP, _soon())
        kinds = [failure_of(decode, second.receive(CAP, _soon())).kind for _ in range(2)]
        value = decode(second.receive(CAP, _soon()))
        reduce_ones(comm)
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return listener.refused - count, too_large, kinds, value, growth


def _attack(member, mark):
    with group(member) as comm, contextlib.ExitStack() as held:
        port = int(member.store.get("port"))
        first = held.enter_context(connect_frames("127.0.0.1", port, _soon()))
        reduce_ones(comm)
        for payload in _hostile(mark):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                with contextlib.suppress(OSError):
                    sock.settimeout(0.05)
                    sock.sendall(payload)
                reduce_ones(comm)
        second = held.enter_context(connect_frames("127.0.0.1", port, _soon()))
        comm.barrier()
        first.send([bytes(CAP + 1)], _soon())
        second.send([pickle.dumps(_Attack(mark))], _soon())
        second.send([b"\xc1\x01\0\0\xff\xff\xff\xff\xdd\xff\xff\xff\xff"], _soon())
        second.send(encode({"x": (1, np.arange(3))}).parts, _soon())
        reduce_ones(comm)


def _serve_or_attack(member, mark):
    return (_listen, _attack)[member.rank](member, mark)


def test_f19_hostile_bytes_are_dropped_and_counted_and_leave_the_group_alone(world, tmp_path):
    mark = tmp_path / "ran"
    (miscounted, too_large, kinds, value, growth), _ = world(2, _serve_or_attack, str(mark))
    assert miscounted == 0
    assert (too_large.kind, too_large.seconds < 5) == ("DecodeError", True)
    assert f"a frame of {CAP + 1} bytes is larger than max_nbytes={CAP}" in too_large.text
    assert kinds == [DecodeError.__name__] * 2
    assert value["x"][0] == 1
    assert value["x"][1].tolist() == [0, 1, 2]
    assert growth < GROWTH_KIB
    assert not mark.exists()

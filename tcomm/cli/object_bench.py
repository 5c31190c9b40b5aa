"""`tcomm bench object_broadcast`: objects to other processes and an answer of each, against others."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist

from tcomm.cli.bench import _gather_cores
from tcomm.cli.workers import run_ranks
from tcomm.errors import ConfigError
from tcomm.groups.communicator import Communicator
from tcomm.groups.queue.message_queue import MessageQueue
from tcomm.tuning.measure import Candidate, Schedule, percentiles, time_alternating

__all__ = [
    "OBJECT_HEADER",
    "ObjectRequest",
    "check_object_request",
    "message_of",
    "object_columns",
    "run_object_bench",
]

_BASELINES = ("gloo", "zmq")
_SMALLEST_BYTES = 64
_LARGE_BYTES, _CALLS_WHEN_LARGE = 4 << 20, 5
_SETUP_SECONDS = 60.0
_PAUSE_SECONDS = 50e-6
_ACK = 1
_DICT_BYTES = 40
"""Of the message without its bytes."""


@dataclasses.dataclass(frozen=True)
class ObjectRequest:
    """What to measure."""

    readers: tuple[int, ...]
    """Numbers of readers, one after another."""
    sizes: tuple[int, ...]
    """Bytes of the message, about."""
    against: tuple[str, ...] = ("gloo",)
    """Baselines in the same run: gloo, zmq."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """How often."""
    pin: bool = False
    """Give each process one core."""


class _Contender(Protocol):
    """A way to pass an object and to hear that it has come."""

    def give(self, value: object) -> object:
        """On rank 0: the round trip."""

    def take(self) -> object:
        """On a reader: the object, answered."""


def check_object_request(request: ObjectRequest) -> ObjectRequest:
    """The request, when it can be carried out.

    Raises:
        ConfigError: when it makes no sense, or a baseline is not installed.
    """
    if not request.readers or min(request.readers) < 1:
        raise ConfigError(f"readers {request.readers}: give one or more positive numbers")
    if not request.sizes or min(request.sizes) < _SMALLEST_BYTES:
        raise ConfigError(f"sizes {request.sizes}: give {_SMALLEST_BYTES} bytes or more")
    unknown = [name for name in request.against if name not in _BASELINES]
    if unknown or not request.against:
        raise ConfigError(f"{', '.join(unknown)!r} is not a baseline; give {' or '.join(_BASELINES)}")
    if "zmq" in request.against and importlib.util.find_spec("zmq") is None:
        raise ConfigError("zmq is not installed; it comes with tcomm[zmq], or leave it out of --against")
    return request


def run_object_bench(request: ObjectRequest, timeout: float) -> list[dict[str, Any]]:
    """Measure, in processes of its own: a row per number of readers, size and baseline.

    Raises:
        ConfigError: when the request makes no sense.
        CommError: when a process failed or the deadline passed.
    """
    check_object_request(request)
    rows: list[dict[str, Any]] = []
    for readers in request.readers:
        with tempfile.TemporaryDirectory(prefix="tcomm-") as directory:
            rows += run_ranks(readers + 1, _measure_all, request, directory, timeout=timeout, pin=request.pin)
    return rows


def _measure_all(request: ObjectRequest, directory: str) -> list[dict[str, Any]]:
    with Communicator(timeout=_SETUP_SECONDS) as comm, contextlib.ExitStack() as stack:
        contenders: dict[str, _Contender] = {"tcomm": _Tcomm(stack)}
        for name in request.against:
            contenders[name] = _Gloo() if name == "gloo" else _Zmq(stack, directory)
        return [row for nbytes in request.sizes for row in _measure(comm, request, contenders, nbytes)]


def _measure(
    comm: Communicator, request: ObjectRequest, contenders: dict[str, _Contender], nbytes: int
) -> list[dict[str, Any]]:
    value, schedule = message_of(nbytes), request.schedule
    if nbytes >= _LARGE_BYTES:
        schedule = dataclasses.replace(schedule, calls=min(schedule.calls, _CALLS_WHEN_LARGE), warmups=2)
    candidates = {name: _candidate(contender, value) for name, contender in contenders.items()}

    def meet() -> None:
        comm.barrier()
        if comm.rank == 0:
            _let_readers_wait()

    seconds, wrong = time_alternating(candidates, schedule, meet, comm.barrier)
    totals = torch.tensor(list(wrong.values()), device="cpu")
    dist.all_reduce(totals)
    wrong = dict(zip(wrong, totals.tolist(), strict=True))
    cores = {core for rank in _gather_cores() for core in rank}
    pinned = "one core a process" if len(cores) >= comm.world_size else f"pinned, {len(cores)} cores"
    affinity = pinned if request.pin else f"{len(cores)} cores for {comm.world_size} processes"
    return [
        _row(nbytes, name, seconds, wrong)
        | {"readers": comm.world_size - 1, "affinity": affinity, "calls": len(seconds["tcomm"])}
        for name in request.against
    ]


def _let_readers_wait() -> None:
    """Give the readers the time to come from the barrier to where they wait; their way is not the queue's."""
    end = time.perf_counter() + _PAUSE_SECONDS
    while time.perf_counter() < end:
        os.sched_yield()


def _row(nbytes: int, name: str, seconds: Mapping[str, Any], wrong: Mapping[str, int]) -> dict[str, Any]:
    ours, theirs = percentiles(seconds["tcomm"] * 1e6), percentiles(seconds[name] * 1e6)
    return {
        "op": "object_broadcast",
        "nbytes": nbytes,
        "median_us": ours.median_us,
        "p10_us": ours.p10_us,
        "p90_us": ours.p90_us,
        "baseline": name,
        "baseline_us": theirs.median_us,
        "baseline_p10_us": theirs.p10_us,
        "baseline_p90_us": theirs.p90_us,
        "ratio": theirs.median_us / ours.median_us,
        "wrong": wrong["tcomm"],
        "checked": wrong["tcomm"] + wrong[name] == 0,
    }


def message_of(nbytes: int) -> dict[str, object]:
    """What is passed: a small dict, and bytes that make it about as long as asked for."""
    count = max(0, nbytes - _DICT_BYTES)
    # No zeros, which memory that was never written has, too; and what is a line too far is another byte.
    data = (bytes(range(1, 252)) * (count // 251 + 1))[:count]
    return {"op": "step", "ids": [1, 2, 3], "scale": 0.5, "data": data}


def _candidate(contender: _Contender, value: dict[str, object]) -> Candidate:
    if dist.get_rank() == 0:
        return Candidate(lambda: contender.give(value), lambda: None, lambda: 0)
    got: list[object] = []
    expected = _digest(value)
    return Candidate(
        lambda: got.append(contender.take()),
        got.clear,
        lambda: sum(_digest(message) != expected for message in got),
    )


def _digest(message: Any) -> object:
    """A message with a checksum for its bytes.

    To be compared with another's: to compare the bytes themselves would fill the reader's caches with a
    second copy before each call, and so time what no reader of one message does.
    """
    if type(message) is not dict or type(message.get("data")) not in (bytes, bytearray):
        return message
    return {**message, "data": (type(message["data"]), zlib.crc32(message["data"]))}


class _Tcomm:
    """A queue to the readers, and one from each of them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        group = dist.group.WORLD
        assert group is not None
        self._queue = MessageQueue.create_from_process_group(group, 24 << 20, 10)
        stack.callback(self._queue.shutdown)
        self._mine, handles = MessageQueue.create_from_process_group_single_reader(group, 4096, 4)
        stack.callback(self._mine.shutdown)
        self._answers = [MessageQueue.create_from_handle(handle, 0) for handle in handles]
        for queue in self._answers:
            stack.callback(queue.shutdown)
        self._answers = self._answers[1:]

    def give(self, value: object) -> object:
        self._queue.enqueue(value)
        return [answer.dequeue() for answer in self._answers]

    def take(self) -> object:
        value = self._queue.dequeue()
        self._mine.enqueue(_ACK)
        return value


class _Gloo:
    """`broadcast_object_list` and a barrier."""

    def give(self, value: object) -> object:
        dist.broadcast_object_list([value], src=0)
        return dist.barrier()

    def take(self) -> object:
        values: list[object] = [None]
        dist.broadcast_object_list(values, src=0)
        dist.barrier()
        return values[0]


class _Zmq:
    """XPUB to the readers and PUSH back, by ipc, with msgspec; received bytes are copied, as zmq does."""

    def __init__(self, stack: contextlib.ExitStack, directory: str) -> None:
        import zmq

        context = stack.enter_context(zmq.Context())
        is_writer = dist.get_rank() == 0
        self._count = dist.get_world_size() - 1
        self._out = stack.enter_context(context.socket(zmq.XPUB if is_writer else zmq.PUSH))
        self._in = stack.enter_context(context.socket(zmq.PULL if is_writer else zmq.SUB))
        for sock in (self._out, self._in):
            sock.setsockopt(zmq.LINGER, 0)
            sock.setsockopt(zmq.RCVTIMEO, int(_SETUP_SECONDS * 1000))
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder().decode
        if is_writer:
            # Every reader's subscription is heard of, and not only the first of a kind.
            self._out.setsockopt(zmq.XPUB_VERBOSE, 1)
            self._out.bind(f"ipc://{directory}/objects")
            self._in.bind(f"ipc://{directory}/answers")
            dist.barrier()
            for _ in range(self._count):
                self._out.recv()
        else:
            dist.barrier()
            self._in.connect(f"ipc://{directory}/objects")
            self._in.setsockopt(zmq.SUBSCRIBE, b"")
            self._out.connect(f"ipc://{directory}/answers")

    def give(self, value: object) -> object:
        self._out.send(self._encode(value))
        return [self._in.recv() for _ in range(self._count)]

    def take(self) -> object:
        value: object = self._decode(self._in.recv())
        self._out.send(self._encode(_ACK))
        return value


def object_columns(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows for people."""
    return [
        [
            str(row["readers"]),
            str(row["nbytes"]),
            f"{row['median_us']:.1f}",
            f"{row['p10_us']:.1f}",
            f"{row['p90_us']:.1f}",
            str(row["wrong"]),
            row["baseline"],
            f"{row['baseline_us']:.1f}",
            f"{row['ratio']:.3g}",
        ]
        for row in rows
    ]


OBJECT_HEADER = ("readers", "size (B)", "time (us)", "p10", "p90", "#wrong", "baseline", "its (us)", "ratio")
"""Titles of `object_columns`."""

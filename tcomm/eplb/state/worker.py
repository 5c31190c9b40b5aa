"""Rearranging beside the forward pass: a thread prepares layers, the main thread switches one a step.

Only the main thread writes weights and maps, between two forward passes, and on all ranks in the same step:
a token is then routed by the same map everywhere. What the steps agree on is one small number a step, and
only while a rearrangement is under way. Protocol: `docs/eplb/async.md`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, Protocol

import torch

from tcomm.config import resolve_timeout
from tcomm.eplb.moving.interrupts import interrupts_later
from tcomm.errors import CollectiveMismatchError, CommError, UsageError
from tcomm.groups.arguments import Timeout

__all__ = ["Switch", "Worker"]

logger = logging.getLogger("tcomm")

_FAILED = -1
_FINISHED = 1 << 30
"""More than any number of layers."""
_SECONDS_TO_NOTICE = 2.0
"""How long the thread may take, behind the deadline of its wait, to say what it waited for."""


class Switch(Protocol):
    """The change of one layer."""

    def prepare(self) -> None:
        """Bring the weights to this rank. **Collective**; returns on every living rank, or raises there."""

    def settle(self, is_agreed: bool) -> bool:
        """Whether to commit; of all ranks' words the first counts. Waits for nobody."""

    def commit(self) -> None:
        """Write weights and map. Waits for nobody."""


@dataclasses.dataclass(eq=False)
class _Job:
    """One rearrangement, and how far it is."""

    plan: Callable[[], Sequence[Switch]]
    switches: Sequence[Switch] | None = None
    num_prepared: int = 0
    num_committed: int = 0
    failure: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """Whether the last layer has been switched."""
        return self.switches is not None and self.num_committed == len(self.switches)

    @property
    def how_far(self) -> str:
        """For errors."""
        done = self.num_committed
        return f"{done} layers of this rearrangement hold the new map, the others the old one"

    @property
    def told(self) -> int:
        """What this rank says of it in a step."""
        if self.failure is not None:
            return _FAILED
        return _FINISHED if self.is_done else self.num_prepared


class Worker:
    """A thread that prepares the layers of one rearrangement after another.

    Args:
        smallest: gives the smallest of the ranks' numbers. **Collective**, and bounded in time.
        device: of the weights; on a GPU the thread has a stream of its own.
        name: of the group, for errors and logs.
        timeout: of the waits of `Switch.prepare`: seconds, a profile, or None: as long as it takes. `stop`,
            and a step after a failure elsewhere, wait for the thread a little longer.
    """

    def __init__(
        self,
        smallest: Callable[[int], int],
        device: torch.device,
        *,
        name: str = "",
        timeout: Timeout = "default",
    ) -> None:
        self._smallest = smallest
        self._device = device
        self._name = name
        seconds = resolve_timeout(timeout)
        self._patience = None if seconds is None else seconds + _SECONDS_TO_NOTICE
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._job: _Job | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a rearrangement is under way. The same on all ranks that have made the same steps."""
        return self._job is not None

    @property
    def thread(self) -> threading.Thread | None:
        """The thread, once there was something to do."""
        return self._thread

    def launch(self) -> threading.Thread:
        """Start the thread, if it does not run yet; `start` does so too."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"eplb-{self._name}", daemon=True)
            self._thread.start()
        return self._thread

    def start(self, plan: Callable[[], Sequence[Switch]]) -> None:
        """Begin a rearrangement, on all ranks in the same step. Returns at once.

        Args:
            plan: says which layers change, the same ones in one order on every rank. Run by the thread.

        Raises:
            UsageError: when one is under way, or the worker was stopped.
        """
        if self.is_busy or self._is_stopping:
            why = "is stopped" if self._is_stopping else "still moves the experts of the rearrangement before"
            raise UsageError(f"the worker of group {self._name!r} {why}")
        with self._changed:
            self._job = _Job(plan)
            self._changed.notify_all()
        self.launch()

    def on_step(self) -> bool:
        """Switch the next layer, if it is ready on all ranks. **Collective** while `is_busy`.

        Returns:
            Whether a layer was switched.

        Raises:
            CommError: on every rank, when the thread of one has failed: what it failed of, where it was this
                rank's; or when the ranks could not agree. Layers that were switched are so on all ranks, the
                others are as they were; the worker is free.
            CollectiveMismatchError: on every rank, when they are at different steps; it may go on.
        """
        job = self._job
        if job is None:
            return False
        with self._changed:
            told = job.told
        try:
            agreed = self._smallest(told)
        except CollectiveMismatchError:
            # All have heard the same, and raise the same.
            raise
        except BaseException:
            # Others may have heard what this rank has not, and switch. Whatever they do, it is over then.
            try:
                if job.num_committed < told < _FINISHED:
                    self._switch(job, False)
            finally:
                self._leave(job)
            raise
        if agreed == _FAILED:
            self._give_up(job)
        if agreed == _FINISHED:
            self._job = None
        if agreed == _FINISHED or agreed <= job.num_committed:
            return False
        if not self._switch(job, True):
            self._leave(job)
            raise CommError(
                f"another rank of group {self._name!r} could not agree on this step; {job.how_far}",
                group=self._name,
                op="eplb",
            )
        return True

    def _leave(self, job: _Job) -> None:
        """Do no more of it."""
        with self._changed:
            if self._job is job:
                self._job = None
            self._changed.notify_all()

    def _switch(self, job: _Job, is_agreed: bool) -> bool:
        """Switch the next layer, unless a rank was first to say that it has not heard of it."""
        assert job.switches is not None
        with interrupts_later():
            switch = job.switches[job.num_committed]
            if not switch.settle(is_agreed):
                return False
            switch.commit()
            with self._changed:
                job.num_committed += 1
                if job.is_done:
                    self._job = None
                self._changed.notify_all()
            return True

    def stop(self) -> None:
        """End the thread. Not collective; may be called twice. Layers not switched yet stay as they are.

        Raises:
            CommError: when the thread is in a wait that does not end in time.
        """
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread is None or self._thread is threading.current_thread():
            return
        self._thread.join(self._patience)
        if self._thread.is_alive():
            raise CommError(
                f"the worker of group {self._name!r} still waits for its peers after {self._patience} s",
                group=self._name,
                op="eplb",
            )
        self._job = None

    def _give_up(self, job: _Job) -> NoReturn:
        """Raise what the thread failed of; where it has not noticed yet, it soon will."""
        with self._changed:
            self._changed.wait_for(lambda: job.failure is not None, self._patience)
        self._leave(job)
        if job.failure is None:
            raise CommError(
                f"another rank of group {self._name!r} could not move its experts; {job.how_far}",
                group=self._name,
                op="eplb",
            )
        job.failure.add_note(job.how_far)
        raise job.failure

    # The thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        with self._own_stream() as await_device:
            while (job := self._next_job()) is not None:
                try:
                    self._prepare_all(job, await_device)
                except BaseException as error:  # noqa: BLE001
                    # For the main thread to raise, in a step that all ranks make.
                    logger.error("rearranging the experts of group %r failed: %s", self._name, error)
                    with self._changed:
                        job.failure = error
                        self._changed.notify_all()

    def _next_job(self) -> _Job | None:
        """What to do next, once there is something; None when it is time to stop."""

        def is_new() -> bool:
            return self._job is not None and self._job.switches is None and self._job.failure is None

        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or is_new())
            return None if self._is_stopping else self._job

    def _prepare_all(self, job: _Job, await_device: Callable[[], None]) -> None:
        switches = job.plan()
        with self._changed:
            job.switches = switches
        for number, switch in enumerate(switches, start=1):
            switch.prepare()
            await_device()
            if not self._is_switched(job, number):
                return

    def _is_switched(self, job: _Job, number: int) -> bool:
        """Wait for the main thread to switch that layer; False when it will not."""
        with self._changed:
            job.num_prepared = number
            self._changed.wait_for(
                lambda: self._is_stopping or self._job is not job or job.num_committed >= number
            )
            return job.num_committed >= number

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[Callable[[], None]]:
        """A stream beside that of the forward pass, and how to wait for it without holding the GIL."""
        if self._device.type != "cuda":
            yield lambda: None
            return
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            yield stream.synchronize

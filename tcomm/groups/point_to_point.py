"""Send and recv of a communicator: through mailboxes in shared memory, or by torch.distributed."""

from __future__ import annotations

import functools
import logging
from typing import Literal, overload

import torch

from tcomm.cpu.point_to_point import TransferPlan, make_recv, make_send
from tcomm.groups.arguments import (
    UNSET,
    Timeout,
    Unset,
    check_out,
    check_rank,
    check_tensor,
    dtype_name,
    is_ordinary,
    is_plain,
)
from tcomm.groups.handle import GroupHandle
from tcomm.groups.work import Work
from tcomm.memory.mailbox import Message
from tcomm.tuning.choose import Decision, make_request

__all__ = ["PointToPoint"]

logger = logging.getLogger("tcomm")

_MAX_PLANS = 1024


class PointToPoint(GroupHandle):
    """Messages from one rank of a communicator to another. Not collective: only the two take part."""

    @overload
    def send(
        self,
        x: torch.Tensor,
        dst: int,
        *,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[False] = False,
        algorithm: str = "",
    ) -> None: ...

    @overload
    def send(
        self,
        x: torch.Tensor,
        dst: int,
        *,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[True],
        algorithm: str = "",
    ) -> Work: ...

    def send(
        self,
        x: torch.Tensor,
        dst: int,
        *,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> Work | None:
        """Send x to rank `dst`, which receives a tensor of this dtype and shape.

        Returns when x may be written again; that is before `dst` receives where x fits the credits of the
        pair: 4 slots of `max(4 KiB, 64 KiB / W)`. A longer message waits for its receiver, so two ranks that
        both send one before they receive wait for each other until the deadline. Messages of a pair arrive in
        order. Takes its turn among the calls of this rank, asynchronous ones included.

        Args:
            x: any shape, stride and dtype, 0-d and empty included.
            dst: another rank of the group.
            timeout: seconds, a profile, or None: as long as the peer lives.
            async_op: return a `Work` that gives x; x belongs to it until it is complete.
            algorithm: engine, algorithm or both that must be used. `cpu` and `triton` understand each other;
                `torch` needs `torch` at both ends.

        Raises:
            ConfigError: when an argument is wrong; nothing was sent.
            CapabilityError: when the engine that is asked for cannot do it, or there is none.
            PeerLostError: when the peer is dead or has left, as far as is known; the group is given up.
            PeerTimeoutError: when the peer does not receive. Where nothing of the message had been sent, the
                group stays usable; else it is given up.
            GroupClosedError: when the group is closed or belongs to another process.
        """
        plan = self._transfer("send", x, "dst", dst, algorithm)
        seconds = self.timeout if timeout is UNSET else self._seconds(timeout)
        run = functools.partial(_send_dense, plan, x, seconds)
        if async_op or self._last_work is not None:
            work = self._in_order(run, async_op)
            return work if isinstance(work, Work) else None
        self._run_now(run)
        return None

    @overload
    def recv(
        self,
        out: torch.Tensor,
        src: int,
        *,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[False] = False,
        algorithm: str = "",
    ) -> torch.Tensor: ...

    @overload
    def recv(
        self,
        out: torch.Tensor,
        src: int,
        *,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[True],
        algorithm: str = "",
    ) -> Work: ...

    def recv(
        self,
        out: torch.Tensor,
        src: int,
        *,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> torch.Tensor | Work:
        """Receive the next message of rank `src` into `out`.

        A message that was sent completely can be received after its sender has left or died.

        Args:
            out: of the dtype and shape that `src` sends; any stride.
            src: another rank of the group.
            timeout: seconds, a profile, or None: as long as the peer lives.
            async_op: return a `Work` that gives out; out belongs to it until it is complete.
            algorithm: engine that must be used, as for `send`.

        Returns:
            `out`; with `async_op`, a `Work` that gives it.

        Raises:
            ConfigError: when an argument is wrong; nothing was received.
            CapabilityError: when the engine that is asked for cannot do it, or there is none.
            CollectiveMismatchError: when the next message has another dtype or shape; it stays, and a recv
                of its kind gets it. The group stays usable. Not told by torch.
            PeerLostError: when the peer is dead or has left and sent no more; the group is given up.
            PeerTimeoutError: when the peer does not send. Where nothing of the message had come, the group
                stays usable; else it is given up.
            GroupClosedError: when the group is closed or belongs to another process.
        """
        plan = self._transfer("recv", out, "src", src, algorithm)
        if out.is_inference() or not out.is_contiguous():
            check_out("recv", out, out, out.shape)
        seconds = self.timeout if timeout is UNSET else self._seconds(timeout)
        run = functools.partial(_recv_dense, plan, out, seconds)
        if async_op or self._last_work is not None:
            result: torch.Tensor | Work = self._in_order(run, async_op)
            return result
        return self._run_now(run)

    def _run_now(self, run: functools.partial[torch.Tensor]) -> torch.Tensor:
        with self._lock:
            if self._foreign:
                self._refuse_foreign()
            try:
                return run()
            except BaseException:
                with self._whole():
                    raise

    def _transfer(self, verb: str, x: torch.Tensor, what: str, peer: int, algorithm: str) -> TransferPlan:
        """The plan for messages like x, once x has been checked."""
        try:
            plan = self._transfers[verb, peer, algorithm, x.dtype, x.shape, x.device, x.layout]
        except (KeyError, AttributeError, TypeError, RuntimeError):
            self._refuse_foreign()
            check_tensor(verb, x)
            check_rank(verb, what, peer, self.world_size, self.rank)
            plan = self._make_transfer(verb, x, peer, algorithm)
            if len(self._transfers) >= _MAX_PLANS:
                self._transfers.clear()
            self._transfers[verb, peer, algorithm, x.dtype, x.shape, x.device, x.layout] = plan
        if not is_ordinary(x):
            check_tensor(verb, x)
        return plan

    def _make_transfer(self, verb: str, x: torch.Tensor, peer: int, algorithm: str) -> TransferPlan:
        nbytes = x.numel() * x.itemsize
        request = make_request(verb, "", x.dtype, nbytes, self.world_size, x.device.type)
        decision = self._choose(request, algorithm)
        if decision.engine == "torch":
            return self._transfer_by_torch(verb, peer, decision)
        arena = self._arena
        if arena is None:
            raise AssertionError("mailboxes were chosen without shared memory")
        if decision.engine == "cpu":
            message = Message(dtype_name(x.dtype), x.shape, nbytes)
            make = make_send if verb == "send" else make_recv
            return make(arena.mailboxes, peer, message)
        # Triton costs most of a second to import, and must not be imported before it is asked for.
        from tcomm.kernels import point_to_point

        launcher = point_to_point.send if verb == "send" else point_to_point.recv

        def run_kernel(x: torch.Tensor, timeout: float | None) -> None:
            launcher(x, arena, peer, timeout=timeout)

        return run_kernel

    def _transfer_by_torch(self, verb: str, peer: int, decision: Decision) -> TransferPlan:
        fallback = self._fallback
        if fallback is None:
            raise AssertionError("torch was chosen without a process group")
        if decision.reason not in self._transfer_reasons:
            self._transfer_reasons.add(decision.reason)
            told = f"send and recv go to {decision.algorithm}: {decision.reason}"
            logger.info("group %r: %s", self.name, told)
        move = fallback.send if verb == "send" else fallback.recv

        def run_fallback(x: torch.Tensor, timeout: float | None) -> None:
            move(x, peer, timeout)

        return run_fallback


def _send_dense(plan: TransferPlan, x: torch.Tensor, seconds: float | None) -> torch.Tensor:
    plan(x if is_plain(x) else torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x), seconds)
    return x


def _recv_dense(plan: TransferPlan, out: torch.Tensor, seconds: float | None) -> torch.Tensor:
    if is_plain(out):
        plan(out, seconds)
        return out
    dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    plan(dense, seconds)
    return out.copy_(dense)

"""send and recv. (Stand-in until the branch with credits is merged.)"""

from __future__ import annotations

import torch

from tcomm.errors import CapabilityError
from tcomm.groups.arguments import UNSET, Timeout, Unset, check_rank, check_tensor
from tcomm.groups.fallback import TorchFallback
from tcomm.groups.handle import GroupHandle
from tcomm.signature import CallDescription

__all__ = ["PointToPoint"]


class PointToPoint(GroupHandle):
    """send and recv."""

    def send(self, x: torch.Tensor, dst: int, *, timeout: Timeout | Unset = UNSET) -> None:
        """Send x to rank `dst`, which receives a tensor of this shape and dtype.

        Raises:
            ConfigError: when `dst` is not another rank of the group; nothing was sent.
            CapabilityError: when there is no process group to carry it out.
            PeerLostError, PeerTimeoutError: when the peer does not receive.
        """
        check_tensor("send", x)
        check_rank("send", "dst", dst, self.world_size, self.rank)
        fallback, seconds = self._torch(CallDescription("send")), self._seconds(timeout)

        def run() -> torch.Tensor:
            fallback.send(x.contiguous(), dst, seconds)
            return x

        self._in_order(run, False)

    def recv(self, out: torch.Tensor, src: int, *, timeout: Timeout | Unset = UNSET) -> torch.Tensor:
        """Receive into `out` from rank `src`.

        Raises:
            ConfigError: when `src` is not another rank of the group.
            CapabilityError: when there is no process group to carry it out.
            PeerLostError, PeerTimeoutError: when the peer does not send.
        """
        check_tensor("recv", out)
        check_rank("recv", "src", src, self.world_size, self.rank)
        fallback, seconds = self._torch(CallDescription("recv")), self._seconds(timeout)

        def run() -> torch.Tensor:
            dense = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
            fallback.recv(dense, src, seconds)
            return out if dense is out else out.copy_(dense)

        self._in_order(run, False)
        return out

    def _torch(self, call: CallDescription) -> TorchFallback:
        self._refuse_foreign()
        if self._fallback is None:
            raise CapabilityError(
                f"{call.op} of group {self.name!r} needs torch.distributed, and there is no process group "
                "behind this communicator; make it from one"
            )
        return self._fallback

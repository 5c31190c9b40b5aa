"""The device communicator of host memory."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch

from tcomm.errors import CommError, DecodeError
from tcomm.groups.arguments import dtype_name
from tcomm.groups.device.base import DeviceCommunicatorBase

__all__ = ["CpuCommunicator"]

_MAX_HEADER_BYTES = 16 << 20


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    """What is sent ahead of a tensor."""

    key: str
    dtype: str
    shape: tuple[int, ...]


class CpuCommunicator(DeviceCommunicatorBase):
    """Collectives in host memory, and dictionaries of tensors from one rank to another."""

    device_types = ("cpu",)

    @property
    def supports_tensor_dict(self) -> bool:
        """Whether dictionaries of tensors go through shared memory."""
        return not self.algorithm and not self.communicator.capabilities.no_shared_memory

    def send_tensor_dict(self, tensor_dict: Mapping[str, torch.Tensor], dst: int | None = None) -> None:
        """Send a dictionary of tensors to one rank.

        Args:
            tensor_dict: tensors of any shape, stride and dtype, by name.
            dst: rank within the group; the next in the ring where None.

        Raises:
            CommError: when a value is no tensor; nothing was sent.
            ConfigError, CapabilityError, CommError: as `send` does.
        """
        for key, value in tensor_dict.items():
            if not isinstance(value, torch.Tensor):
                raise CommError(
                    f"CpuCommunicator only supports sending tensors. {key!r} is a {type(value).__name__}",
                    group=self.unique_name,
                    op="send_tensor_dict",
                    rank=self.rank,
                )
        entries = [_Entry(key, dtype_name(x.dtype), tuple(x.shape)) for key, x in tensor_dict.items()]
        header = bytearray(msgspec.msgpack.encode(entries))
        self.send(torch.tensor([len(header)], device="cpu"), dst)
        self.send(torch.frombuffer(header, dtype=torch.uint8), dst)
        for value in tensor_dict.values():
            self.send(value, dst)

    def recv_tensor_dict(self, src: int | None = None) -> dict[str, torch.Tensor]:
        """Receive the next dictionary of tensors of one rank.

        Args:
            src: rank within the group; the previous in the ring where None.

        Returns:
            New contiguous tensors, in the order in which they were sent.

        Raises:
            DecodeError: when what comes is no dictionary of tensors.
            ConfigError, CapabilityError, CommError: as `recv` does.
        """
        nbytes = int(self.recv((1,), torch.int64, src))
        if not 0 < nbytes <= _MAX_HEADER_BYTES:
            raise self._undecoded(f"{nbytes} bytes are announced, at most {_MAX_HEADER_BYTES} can be")
        header = self.recv((nbytes,), torch.uint8, src).numpy().data
        try:
            entries = msgspec.msgpack.decode(header, type=list[_Entry])
        except msgspec.DecodeError as error:
            raise self._undecoded(str(error)) from error
        received = {}
        for entry in entries:
            dtype = getattr(torch, entry.dtype, None)
            if not isinstance(dtype, torch.dtype) or any(size < 0 for size in entry.shape):
                raise self._undecoded(f"{entry.dtype} {list(entry.shape)} is no tensor")
            received[entry.key] = self.recv(entry.shape, dtype, src)
        return received

    def _undecoded(self, told: str) -> DecodeError:
        return DecodeError(
            f"recv_tensor_dict of group {self.unique_name!r}: {told}",
            group=self.unique_name,
            op="recv_tensor_dict",
            rank=self.rank,
        )

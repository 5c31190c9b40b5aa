"""Messages of a rank to itself, in a group where there is nobody else."""

from __future__ import annotations

import collections

import torch

from tcomm.errors import CollectiveMismatchError, ConfigError
from tcomm.groups.arguments import dtype_name

__all__ = ["Loopback"]


class Loopback:
    """A queue of tensors, in the order in which they were sent."""

    def __init__(self) -> None:
        self._messages: collections.deque[torch.Tensor] = collections.deque()

    def send(self, x: torch.Tensor) -> None:
        """Keep a copy of x until it is received."""
        self._messages.append(x.detach().clone(memory_format=torch.contiguous_format))

    def recv(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The oldest message.

        Raises:
            ConfigError: when there is none; nobody else could send one.
            CollectiveMismatchError: when it is of another shape or dtype; it stays.
        """
        if not self._messages:
            raise ConfigError("recv of a rank from itself, which has sent nothing; send first")
        message = self._messages[0]
        if message.shape != shape or message.dtype != dtype:
            raise CollectiveMismatchError(
                f"the next message is {dtype_name(message.dtype)} {list(message.shape)}; "
                f"recv asked for {dtype_name(dtype)} {list(shape)}",
                op="recv",
                rank=0,
                peers=(0,),
            )
        return self._messages.popleft()

    def clear(self) -> None:
        """Forget what was not received."""
        self._messages.clear()

"""Collectives on tensors, as an inference engine calls them on a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tcomm.errors import ConfigError
from tcomm.groups.arguments import check_out, check_tensor
from tcomm.groups.compiled import ops  # noqa: F401  it defines what _OPS has
from tcomm.groups.device.experts import ExpertTraffic
from tcomm.groups.device.loopback import Loopback
from tcomm.groups.device.sizes import check_gatherv, dim_of, rank_of, scatter_of, shape_of

if TYPE_CHECKING:
    from tcomm.groups.communicator import Communicator
    from tcomm.groups.device.base import DeviceCommunicatorBase

__all__ = ["TensorVerbs"]


_NOBODY = ExpertTraffic()
_OPS = torch.ops.tcomm
"""A compiled graph holds an op and the name of the group."""


class TensorVerbs:
    """Tensor collectives of a coordinator. `src` and `dst` are ranks within the group.

    Results are new tensors and inputs stay as they are, except where a verb says otherwise. In a group of
    one rank the result is the input itself, once the arguments are checked as in any group. Errors are those
    of `Communicator`, unless said; after `destroy`, ConfigError "Group ... is destroyed."
    """

    world_size: int
    rank_in_group: int
    unique_name: str
    destroyed: bool = False
    device_communicator: DeviceCommunicatorBase | None
    control: Communicator | None
    _loopback: Loopback

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum over the group, the same bits on every rank. **Collective.**

        Args:
            input_: any shape and stride.

        Raises:
            ConfigError: "No device communicator found", when the group was made without one.
        """
        if self.world_size == 1:
            self._check_alone("all_reduce", input_)
            return input_
        if torch.compiler.is_compiling():
            result: torch.Tensor = _OPS.all_reduce(input_, self.unique_name)
            return result
        return self._all_reduce_out_place(input_)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The inputs of all ranks one behind the other along `dim`. **Collective.**

        Args:
            input_: [..., N, ...] of one shape on every rank, not 0-d.
            dim: may be negative.

        Returns:
            [..., W * N, ...].

        Raises:
            UsageError: "Invalid dim ..."
        """
        if self.world_size == 1:
            self._check_alone("all_gather", input_, dim)
            return input_
        if torch.compiler.is_compiling():
            result: torch.Tensor = _OPS.all_gather(input_, dim, self.world_size, self.unique_name)
            return result
        return self._all_gather_out_place(input_, dim)

    def all_gatherv(
        self,
        input_: torch.Tensor | list[torch.Tensor],
        dim: int = 0,
        sizes: list[int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """As `all_gather` along dim 0, with rank `r` giving `sizes[r]` rows. **Collective.**

        Args:
            input_: a tensor, or several with the same numbers of rows.
            dim: 0.
            sizes: rows of each rank, the same list on every rank; None: all have as many as this one.

        Returns:
            A tensor of `sum(sizes)` rows, or a list of them.
        """
        if self.world_size == 1:
            self._check_alive()
            check_gatherv(input_, dim, sizes, 0, 1)
            return input_
        return self._device_communicator().all_gatherv(input_, dim, sizes)

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """This rank's chunk, along `dim`, of the sum over the group. **Collective.**

        Args:
            input_: [..., W * N, ...] of one shape on every rank, not 0-d.
            dim: may be negative.

        Returns:
            [..., N, ...].

        Raises:
            UsageError: "Invalid dim ..."
            ConfigError: when the dimension does not divide by W.
        """
        if self.world_size == 1:
            self._check_alone("reduce_scatter", input_, dim)
            return input_
        if torch.compiler.is_compiling():
            result: torch.Tensor = _OPS.reduce_scatter(input_, dim, self.world_size, self.unique_name)
            return result
        return self._reduce_scatter_out_place(input_, dim)

    def reduce_scatterv(
        self, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        """As `reduce_scatter`, with rank `r` getting `sizes[r]` rows along `dim`. **Collective.**"""
        if self.world_size == 1:
            self._check_alive()
            scatter_of("reduce_scatterv", input_, dim, sizes, 1)
            return input_
        return self._device_communicator().reduce_scatterv(input_, dim, sizes)

    def reduce_scatterv_into_output(
        self, input_: torch.Tensor, output: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        """`reduce_scatterv` into `output`, which is returned. **Collective.**"""
        if self.world_size == 1:
            self._check_alive()
            verb = "reduce_scatterv_into_output"
            scatter_of(verb, input_, dim, sizes, 1)
            check_out(verb, input_, output, input_.shape)
            return output.copy_(input_)
        return self._device_communicator().reduce_scatterv_into_output(input_, output, dim, sizes)

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """As `all_gather`, with the result on rank `dst` alone and None elsewhere. **Collective.**"""
        if self.world_size == 1:
            self._check_alone("gather", input_, dim)
            self._check_rank("gather", "dst", dst)
            return input_
        return self._device_communicator().gather(input_, dst, dim)

    def broadcast(self, input_: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Write rank `src`'s tensor into everybody's, in place. **Collective.**

        Returns:
            `input_`.

        Raises:
            UsageError: "Invalid src rank ..."
        """
        self._check_alive()
        check_tensor("broadcast", input_, False)
        self._check_rank("broadcast", "src", src)
        if self.world_size == 1:
            return input_
        return self._broadcast_in_place(input_, src)

    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        """Send a tensor to rank `dst`, by default the next in the ring; alone, to oneself."""
        peer = self._peer("send", "dst", dst, 1)
        if self.world_size == 1:
            self._loopback.send(check_tensor("send", tensor))
        else:
            self._device_communicator().send(tensor, peer)

    def recv(self, size: torch.Size, dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        """The next tensor from rank `src`, by default the one before in the ring, on the group's device."""
        peer = self._peer("recv", "src", src, -1)
        if self.world_size == 1:
            return self._loopback.recv(shape_of("recv", size, dtype), dtype)
        return self._device_communicator().recv(size, dtype, peer)

    def cpu_all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor in host memory in place, to the same bits everywhere. **Collective.**"""
        if self.world_size == 1:
            self._check_alone("cpu_all_reduce_", tensor)
            return tensor
        result: torch.Tensor = self._control().all_reduce(tensor, out=tensor)
        return result

    def barrier(self) -> None:
        """Return when every rank of the group has called it; GPUs are not waited for. **Collective.**"""
        self._check_alive()
        if self.world_size > 1:
            self._control().barrier()

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        topk_ids: torch.Tensor | bool | None = None,
        is_sequence_parallel: bool | Sequence[torch.Tensor] | None = False,
        extra_tensors: Sequence[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Send tokens to the ranks of their experts: `dispatch` of the device communicator, as it says.

        Without one everything is given back as it came, extra tensors included.
        """
        return self._experts.dispatch(
            hidden_states, router_logits, topk_ids, is_sequence_parallel, extra_tensors
        )

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: Sequence[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """`dispatch` by the router's logits; as there."""
        return self._experts.dispatch_router_logits(
            hidden_states, router_logits, is_sequence_parallel, extra_tensors
        )

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """Bring the experts' results back: `combine` of the device communicator; without one, as they are."""
        return self._experts.combine(hidden_states, is_sequence_parallel)

    def allocate_combine_input(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        is_sequence_parallel: bool = False,
    ) -> torch.Tensor | None:
        """Memory from which results are combined without a copy, or None."""
        return self._experts.allocate_combine_input(shape, dtype, device, is_sequence_parallel)

    def combine_into_output(
        self, hidden_states: torch.Tensor, output: torch.Tensor, is_sequence_parallel: bool = False
    ) -> torch.Tensor:
        """`combine` into `output`, which is returned."""
        return self._experts.combine_into_output(hidden_states, output, is_sequence_parallel)

    def _check_alive(self) -> None:
        if self.destroyed:
            raise ConfigError(f"Group {self.unique_name} is destroyed.")

    def _check_alone(self, verb: str, x: torch.Tensor, *dims: int) -> None:
        """Check, in a group of one, what a device communicator would."""
        self._check_alive()
        if torch.compiler.is_compiling():
            return
        check_tensor(verb, x, False)
        for dim in dims:
            dim_of(verb, x, dim)

    @property
    def _experts(self) -> ExpertTraffic:
        self._check_alive()
        return _NOBODY if self.device_communicator is None else self.device_communicator

    def _all_reduce_out_place(self, input_: torch.Tensor) -> torch.Tensor:
        device = self.device_communicator
        return (self._device_communicator() if device is None else device).all_reduce(input_)

    def _all_gather_out_place(self, input_: torch.Tensor, dim: int) -> torch.Tensor:
        return self._device_communicator().all_gather(input_, dim)

    def _reduce_scatter_out_place(self, input_: torch.Tensor, dim: int) -> torch.Tensor:
        return self._device_communicator().reduce_scatter(input_, dim)

    def _device_communicator(self) -> DeviceCommunicatorBase:
        if self.device_communicator is None:
            self._check_alive()
            why = "has one rank" if self.world_size == 1 else "was made without one"
            raise ConfigError(f"No device communicator found: group {self.unique_name!r} {why}")
        return self.device_communicator

    def _control(self) -> Communicator:
        if self.control is None:
            self._check_alive()
            raise ConfigError(f"group {self.unique_name!r} has one rank: nobody to talk to")
        return self.control

    def _broadcast_in_place(self, x: torch.Tensor, src: int) -> torch.Tensor:
        """For a tensor wherever it is: in host memory by the control communicator, which every group has."""
        if x.is_cpu:
            return self._control().broadcast(x, src, out=x)
        return self._device_communicator().broadcast(x, src)

    def _peer(self, verb: str, what: str, rank: int | None, step: int) -> int:
        self._check_alive()
        if rank is None:
            return (self.rank_in_group + step) % self.world_size
        return self._check_rank(verb, what, rank)

    def _check_rank(self, verb: str, what: str, rank: int) -> int:
        return rank_of(verb, what, rank, self.world_size, self.unique_name)

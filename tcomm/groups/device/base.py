"""The device communicator of a group: the surface of vllm.distributed over a `Communicator`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from tcomm.errors import ConfigError
from tcomm.groups.arguments import UNSET, Timeout, Unset, check_tensor
from tcomm.groups.device.loopback import Loopback
from tcomm.groups.device.managed import ManagedTraffic
from tcomm.groups.device.opening import open_communicator
from tcomm.groups.device.sizes import check_gatherv, dim_of, rank_of, scatter_of, shape_of
from tcomm.tuning.choose import Decision

__all__ = ["DeviceCommunicatorBase"]

_MODULES_OF_EXPERTS = frozenset({"FusedMoE", "SharedFusedMoE"})


class DeviceCommunicatorBase(ManagedTraffic):
    """Collectives of one group on one device. **Collective** to create.

    Every rank passed in or given is a rank within the group. Results are new tensors and inputs stay as
    they are, whatever the device and at a world of one too; only `broadcast` and what has `output` in its
    name write to what they are given. Any dimension and stride will do, and any dtype that is only moved.
    There is no sum of booleans, nor of float8.

    Args:
        cpu_group: process group of the ranks; None as for `Communicator`.
        device: of the tensors; the CPU where None.
        device_group: process group of the same ranks on that device, if there is another.
        unique_name: of the group, such as `tp:0`; what stands before the colon tells what it is for.
        global_ranks: of the members, for a group that torch does not know; it has nothing to fall back to.
        global_world_size: ranks in the whole job, likewise.
        use_all2all: whether tokens are exchanged through this group; counts where the group is `ep`.
        use_kernels: use tcomm's own algorithms. Where False, torch.distributed does everything.
        all2all_backend: what tokens are exchanged with: a name of `BACKENDS`, or "auto"; None: as
            TCOMM_ALL2ALL_BACKEND says, or else all-gather and reduce-scatter.
        timeout: of calls: seconds, a profile, or None: as long as the peers live.

    Raises:
        ConfigError: when the arguments do not fit the group.
        CapabilityError: when nothing is left to use.
        RendezvousError, GroupMismatchError: as `Communicator` does.
    """

    device_types: tuple[str, ...] = ()
    """Types of device that this class is for; empty: any."""

    def __init__(  # noqa: PLR0913
        self,
        cpu_group: dist.ProcessGroup | None,
        device: torch.device | str | None = None,
        device_group: dist.ProcessGroup | None = None,
        unique_name: str = "",
        *,
        global_ranks: Sequence[int] | None = None,
        global_world_size: int | None = None,
        use_all2all: bool = False,
        use_kernels: bool = True,
        all2all_backend: str | None = None,
        timeout: Timeout | Unset = UNSET,
    ) -> None:
        self.device = torch.device("cpu" if device is None else device)
        if self.device_types and self.device.type not in self.device_types:
            raise ConfigError(
                f"{type(self).__name__} is for {' or '.join(self.device_types)}, not for {self.device}"
            )
        self.cpu_group = cpu_group
        self.device_group = device_group
        self.unique_name = unique_name
        base_name = unique_name.split(":")[0]
        self.is_ep_communicator = base_name == "ep"
        """Whether experts are spread over the group."""
        self.use_all2all = self.is_ep_communicator and use_all2all
        self.all2all_backend = self._backend_of(all2all_backend)
        self.algorithm = "" if use_kernels else "torch"
        """Given to every call of `communicator`; empty: its own choice."""
        group = device_group if device_group is not None and self.device.type != "cpu" else cpu_group
        self.communicator = open_communicator(group, unique_name, global_ranks, use_kernels, timeout)
        self.rank = self.rank_in_group = self.communicator.rank
        self.world_size = self.communicator.world_size
        self.ranks = list(self.communicator.global_ranks if global_ranks is None else global_ranks)
        self.global_rank = self.ranks[self.rank]
        known = dist.get_world_size() if dist.is_initialized() else self.world_size
        self.global_world_size = known if global_world_size is None else global_world_size
        self._loopback = Loopback()
        try:
            self._open_traffic()
        except BaseException:
            self.destroy()
            raise

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, the same bits on each. **Collective.**

        Args:
            input_: any shape and stride, of numbers of 16 bits or more, or integers; not modified.

        Returns:
            A new contiguous tensor.

        Raises:
            ConfigError, CapabilityError, CommError: as `Communicator.all_reduce` does.
        """
        return self.communicator.all_reduce(input_, algorithm=self.algorithm)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """All ranks' tensors, one after another along `dim`. **Collective.**

        Args:
            input_: [..., N, ...] of one shape and dtype on every rank, at least one dimension.
            dim: may be negative.

        Returns:
            [..., W * N, ...].

        Raises:
            UsageError: when there is no such dimension.
            ConfigError, CapabilityError, CommError: as `Communicator.all_gather_single` does.
        """
        at = dim_of("all_gather", input_, dim)
        return self.communicator.all_gather_single(input_, dim=at, algorithm=self.algorithm)

    def all_gatherv(
        self,
        input_: torch.Tensor | Sequence[torch.Tensor],
        dim: int = 0,
        sizes: Sequence[int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """All ranks' tensors, whose lengths along `dim` may differ. **Collective.**

        Args:
            input_: [..., sizes[rank], ...], or several such tensors, of any dtypes and other dimensions,
                that travel together.
            dim: may be negative.
            sizes: length on every rank, the same list on every rank, 0 is fine; None: the same everywhere.

        Returns:
            [..., sum(sizes), ...], or a list of such.

        Raises:
            UsageError: when sizes do not fit the group or a tensor; nothing was sent.
            ConfigError, CapabilityError, CommError: as `Communicator.all_gatherv` does.
        """
        at, lengths = check_gatherv(input_, dim, sizes, self.rank, self.world_size)
        many = [input_] if isinstance(input_, torch.Tensor) else list(input_)
        rows = [x.shape[d] for x, d in zip(many, at, strict=True)]
        uniform = lengths is None or len(set(lengths)) == 1
        if uniform and (isinstance(input_, torch.Tensor) or len(set(rows)) > 1):
            gathered = [self.all_gather(x, d) for x, d in zip(many, at, strict=True)]
            return gathered[0] if isinstance(input_, torch.Tensor) else gathered
        told = lengths or (rows[0],) * self.world_size if rows else ()
        result: torch.Tensor | list[torch.Tensor] = self.communicator.all_gatherv(
            input_, told, dim=dim, algorithm=self.algorithm
        )
        return result

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The sum over the ranks, of which each gets its chunk along `dim`. **Collective.**

        Args:
            input_: [..., W * N, ...] of one shape and dtype on every rank.
            dim: may be negative.

        Returns:
            [..., N, ...].

        Raises:
            UsageError: when there is no such dimension, or it does not divide among the ranks.
            ConfigError, CapabilityError, CommError: as `Communicator.reduce_scatter_single` does.
        """
        return self._reduce_scatter("reduce_scatter", input_, dim, None, None)

    def reduce_scatterv(
        self, input_: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None
    ) -> torch.Tensor:
        """The sum over the ranks, of which rank `r` gets `sizes[r]` along `dim`. **Collective.**

        Args:
            input_: [..., sum(sizes), ...] of one shape and dtype on every rank.
            dim: may be negative.
            sizes: length for every rank, the same list on every rank, 0 is fine; None: equal chunks.

        Returns:
            [..., sizes[rank], ...].

        Raises:
            UsageError: when sizes do not fit the group or the tensor; nothing was sent.
            ConfigError, CapabilityError, CommError: as `Communicator.reduce_scatterv` does.
        """
        return self._reduce_scatter("reduce_scatterv", input_, dim, sizes, None)

    def reduce_scatterv_into_output(
        self,
        input_: torch.Tensor,
        output: torch.Tensor,
        dim: int = -1,
        sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """`reduce_scatterv` into memory of the caller. **Collective.**

        Args:
            input_: as for `reduce_scatterv`.
            output: [..., sizes[rank], ...], apart from the input.
            dim: as for `reduce_scatterv`.
            sizes: as for `reduce_scatterv`.

        Returns:
            `output`.

        Raises:
            UsageError, ConfigError, CapabilityError, CommError: as `reduce_scatterv` does, and when `output`
                has another shape, dtype or device.
        """
        check_tensor("reduce_scatterv_into_output", output, False)
        return self._reduce_scatter("reduce_scatterv_into_output", input_, dim, sizes, output)

    def _reduce_scatter(
        self,
        verb: str,
        x: torch.Tensor,
        dim: int,
        sizes: Sequence[int] | None,
        output: torch.Tensor | None,
    ) -> torch.Tensor:
        at, lengths = scatter_of(verb, x, dim, sizes, self.world_size)
        if lengths is None or len(set(lengths)) == 1:
            return self.communicator.reduce_scatter_single(x, dim=at, out=output, algorithm=self.algorithm)
        result: torch.Tensor = self.communicator.reduce_scatterv(
            x, lengths, dim=at, out=output, algorithm=self.algorithm
        )
        return result

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """All ranks' tensors, one after another along `dim`, on rank `dst` alone. **Collective.**

        Args:
            input_: [..., N, ...] of one shape and dtype on every rank, at least one dimension.
            dst: rank within the group.
            dim: may be negative.

        Returns:
            [..., W * N, ...] on `dst`, None elsewhere.

        Raises:
            UsageError: when there is no such dimension, or `dst` is no rank of the group; nothing was sent.
            ConfigError, CapabilityError, CommError: as `Communicator.gather` does.
        """
        at = dim_of("gather", input_, dim)
        root = self._rank_of("gather", "dst", dst)
        return self.communicator.gather(input_, root, dim=at, algorithm=self.algorithm)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Fill the tensor of every rank with that of rank `src`. **Collective.**

        Args:
            tensor: of one shape and dtype on every rank, any stride.
            src: rank within the group.

        Returns:
            `tensor`.

        Raises:
            UsageError: when `src` is no rank of the group; nothing was sent.
            ConfigError, CapabilityError, CommError: as `Communicator.broadcast` does.
        """
        root = self._rank_of("broadcast", "src", src)
        return self.communicator.broadcast(tensor, root, out=tensor, algorithm=self.algorithm)

    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        """Send a tensor to one rank, and return when it may be written again.

        Args:
            tensor: any shape, stride and dtype.
            dst: rank within the group; the next in the ring where None.

        Raises:
            UsageError: when `dst` is no rank of the group; nothing was sent.
            ConfigError: also when `dst` is this rank, among others.
            CapabilityError, CommError: as `Communicator.send` does.
        """
        to = (self.rank + 1) % self.world_size if dst is None else self._rank_of("send", "dst", dst)
        if self.world_size == 1:
            self._loopback.send(check_tensor("send", tensor))
            return
        self.communicator.send(tensor, to, algorithm=self.algorithm)

    def recv(self, size: Sequence[int], dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        """Receive the next tensor of one rank.

        Args:
            size: shape that is sent.
            dtype: element type that is sent.
            src: rank within the group; the previous in the ring where None.

        Returns:
            A new tensor on `device`.

        Raises:
            UsageError: when `src` is no rank of the group.
            ConfigError: also when `src` is this rank, among others, or there is no tensor of that shape.
            CollectiveMismatchError: when the next message has another shape or dtype; it stays.
            CapabilityError, CommError: as `Communicator.recv` does.
        """
        of = (self.rank - 1) % self.world_size if src is None else self._rank_of("recv", "src", src)
        shape = shape_of("recv", size, dtype)
        if self.world_size == 1:
            return self._loopback.recv(shape, dtype)
        out = torch.empty(shape, dtype=dtype, device=self.device)
        return self.communicator.recv(out, of, algorithm=self.algorithm)

    def explain(
        self, verb: str, *, nbytes: int = 0, dtype: torch.dtype = torch.float32, op: object = "sum"
    ) -> Decision:
        """What is used for such a call on `device`, and why; see `Communicator.explain`.

        Args:
            verb: a collective method of `Communicator`, such as `all_gather_single`.
            nbytes: as there.
            dtype: element type.
            op: reduce operation, for verbs that reduce.

        Raises:
            CapabilityError, ConfigError: as the call would.
        """
        return self.communicator.explain(
            verb, nbytes=nbytes, dtype=dtype, op=op, device=self.device.type, algorithm=self.algorithm
        )

    def prepare_communication_buffer_for_model(self, model: nn.Module) -> None:
        """Let the expert layers of a model make what they exchange tokens with. **Collective** if they do.

        In a group `ep`, calls `maybe_init_modular_kernel()` of every module whose class is called
        `FusedMoE` or `SharedFusedMoE`; elsewhere nothing.

        Args:
            model: whose modules are looked through.

        Raises:
            ConfigError: when it is no module.
        """
        super().prepare_communication_buffer_for_model(model)
        if not self.is_ep_communicator:
            return
        for module in model.modules():
            if type(module).__name__ in _MODULES_OF_EXPERTS:
                module.maybe_init_modular_kernel()  # type: ignore[operator]

    def _rank_of(self, verb: str, what: str, rank: int) -> int:
        return rank_of(verb, what, rank, self.world_size, self.unique_name)

    def destroy(self) -> None:
        """Leave the group and give its memory back. Not collective; may be called twice."""
        self._close_traffic()
        self.communicator.close()
        self._loopback.clear()

"""Collectives among virtual ranks: W ranks in this process, on one GPU or in the interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from tcomm.config import Config, resolve_timeout
from tcomm.errors import ConfigError
from tcomm.groups.arguments import (
    UNSET,
    Timeout,
    Unset,
    check_prepared,
    dtype_name,
    has_tangent,
    is_ordinary,
    refuse_tracers,
)
from tcomm.memory.layout import StagingLayout
from tcomm.memory.virtual import Mode, VirtualArena
from tcomm.parts import Parts, broadcast_parts, exchange_parts, gather_parts, scatter_parts
from tcomm.signature import CallDescription

__all__ = ["VirtualRanks"]

_ROW_BYTES = 16
_Plan = tuple[Callable[[torch.Tensor, torch.Tensor, float | None], None], tuple[int, ...]]


_MAX_PLANS = 1024
_IN_PLACE = ("all_reduce", "all_to_all", "broadcast")
"""Verbs whose every part stays in its place."""


def _overlap(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether rows of x and of out share memory; rows of both may alternate."""
    steps = [t.stride(0) * t.itemsize for t in (x, out)]
    lengths = [t[0].numel() * t.itemsize for t in (x, out)]
    apart = out.data_ptr() - x.data_ptr()
    if not (-steps[1] * (len(out) - 1) - lengths[1] < apart < steps[0] * (len(x) - 1) + lengths[0]):
        return False
    if steps[0] != steps[1] or not steps[0] or len(x) == 1:
        return True
    return apart % steps[0] < lengths[0] or apart % steps[0] + lengths[1] > steps[0]


class VirtualRanks:
    """W ranks that are this process: every kernel and protocol of real ones, without peers.

    To develop, test and time a kernel for eight ranks on one GPU, or on a laptop. Tensors have a row for each
    rank; every call makes all ranks call. Algorithms are given by name, since nothing here is to be chosen.

    Args:
        world_size: 1 to 16.
        device: of the tensors; None: the current CUDA device, or where there is none the CPU, where kernels
            are interpreted.
        staging_bytes: of each rank.
        mode: `grid`, one cooperative launch with the rank as an axis of the grid, or `streams`, a launch for
            each rank in a stream of its own, all of which have to fit the GPU together.
        timeout: as of `Communicator`; a wait that exceeds it ends with an error, and the ranks with it.

    Raises:
        ConfigError: when an argument is wrong.
    """

    def __init__(
        self,
        world_size: int,
        device: torch.device | str | None = None,
        *,
        staging_bytes: int = 8 << 20,
        mode: Mode = "grid",
        timeout: Timeout | Unset = UNSET,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type not in {"cpu", "cuda"} or (
            self.device.type == "cuda" and not torch.cuda.is_available()
        ):
            raise ConfigError(
                f"device={str(self.device)!r} cannot be used here; give 'cpu', or a CUDA device"
            )
        if self.device.type == "cuda" and device in ("cuda", torch.device("cuda")):
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.world_size = world_size
        self.timeout = resolve_timeout(
            Config.from_environment().timeout if isinstance(timeout, Unset) else timeout
        )
        self.arena = VirtualArena(world_size, self.device, staging_bytes, mode)
        self._plans: dict[tuple[object, ...], _Plan] = {}
        self._lock = threading.Lock()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[W, *shape], uninitialised, each row at a multiple of 16 bytes as kernels want it."""
        if any(length < 0 for length in shape):
            raise ConfigError(f"a tensor {list(shape)} has a negative length")
        row = torch.Size(shape).numel()
        padded = -(-row * dtype.itemsize // _ROW_BYTES) * _ROW_BYTES // dtype.itemsize
        flat = torch.empty(self.world_size, max(padded, 1), dtype=dtype, device=self.device)
        return flat[:, :row].unflatten(1, shape) if shape else flat[:, 0]

    def prepare(
        self, max_nbytes: int, dtypes: Sequence[torch.dtype] = (), ops: Sequence[str] = ("sum",)
    ) -> None:
        """Do ahead what cannot be done while a graph is captured: as `Communicator.prepare`.

        Args:
            max_nbytes: of a message that goes in one piece; graphs captured before keep their staging.
            dtypes: for which kernels are compiled and loaded now.
            ops: reduce operations, likewise.

        Raises:
            CapabilityError: while a graph is captured.
        """
        from tcomm.kernels.warmup import compile_ahead

        check_prepared(max_nbytes, dtypes, ops)
        nbytes = StagingLayout.for_message(max_nbytes, self.world_size)
        if self.arena.staging is None or self.arena.staging.layout.nbytes < nbytes:
            self.arena.grow(nbytes)
            self._plans = {}
        compile_ahead(self.arena, dtypes, ops)

    def check(self) -> None:
        """Wait until all calls are done, and raise what they found.

        Raises:
            PeerTimeoutError: when a rank waited in vain.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.arena.channel.raise_recorded()

    def all_reduce(
        self,
        x: torch.Tensor,
        op: str = "sum",
        *,
        algorithm: str = "two_shot",
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
    ) -> torch.Tensor:
        """[W, ...]: in every row the reduction of all rows of x, which is [W, ...].

        Raises:
            ConfigError: when an argument is wrong. PeerTimeoutError: when an earlier call failed.
        """
        return self._call("all_reduce", x, algorithm, out, timeout, op)

    def reduce_scatter_single(
        self,
        x: torch.Tensor,
        op: str = "sum",
        *,
        algorithm: str = "pull",
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
    ) -> torch.Tensor:
        """[W, numel / W]: in row r the r-th part of the reduction of all rows of x, which is [W, numel].

        Raises:
            ConfigError: when an argument is wrong. PeerTimeoutError: when an earlier call failed.
        """
        return self._call("reduce_scatter", x, algorithm, out, timeout, op)

    def all_gather_single(
        self,
        x: torch.Tensor,
        *,
        algorithm: str = "pull",
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
    ) -> torch.Tensor:
        """[W, W * numel]: in every row all rows of x, which is [W, numel], one after another.

        Raises:
            ConfigError: when an argument is wrong. PeerTimeoutError: when an earlier call failed.
        """
        return self._call("all_gather", x, algorithm, out, timeout)

    def all_to_all_single(
        self,
        x: torch.Tensor,
        *,
        algorithm: str = "pull",
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
    ) -> torch.Tensor:
        """[W, numel]: in row r the r-th part of every row of x, which is [W, numel].

        Raises:
            ConfigError: when an argument is wrong. PeerTimeoutError: when an earlier call failed.
        """
        return self._call("all_to_all", x, algorithm, out, timeout)

    def broadcast(
        self,
        x: torch.Tensor,
        root: int,
        *,
        algorithm: str = "pull",
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
    ) -> torch.Tensor:
        """[W, numel]: in every row the row `root` of x, which is [W, numel].

        Raises:
            ConfigError: when an argument is wrong. PeerTimeoutError: when an earlier call failed.
        """
        if not 0 <= root < self.world_size:
            raise ConfigError(f"root={root} is none of {self.world_size} virtual ranks")
        return self._call("broadcast", x, algorithm, out, timeout, root=root)

    def barrier(self, timeout: Timeout | Unset = UNSET) -> None:
        """Make every rank wait for every other.

        Raises:
            PeerTimeoutError: when an earlier call failed.
        """
        from tcomm.kernels.barrier import arrival_barrier

        with self._lock:
            arrival_barrier(self.arena, timeout=self._seconds(timeout))

    def _call(
        self,
        verb: str,
        x: torch.Tensor,
        algorithm: str,
        out: torch.Tensor | None,
        timeout: Timeout | Unset,
        op: str = "",
        root: int = -1,
    ) -> torch.Tensor:
        """Make a call, by what an earlier one of its kind has bound."""
        if not isinstance(x, torch.Tensor):
            raise ConfigError(f"{verb} takes a torch.Tensor, not {type(x).__name__}")
        if not is_ordinary(x):
            refuse_tracers(verb)
        key = (verb, algorithm, op, root, x.dtype, x.shape, x.stride(), None if out is None else out.stride())
        plan = self._plans.get(key)
        run, shape = plan or self._plan(verb, x, algorithm, op, root)
        if out is None:
            out = self.empty(*shape, dtype=x.dtype)
        elif out.dtype != x.dtype or out.shape != (self.world_size, *shape):
            raise ConfigError(
                f"out is {dtype_name(out.dtype)} {list(out.shape)}; it must be {dtype_name(x.dtype)} "
                f"{[self.world_size, *shape]}"
            )
        self._check("x", x)
        self._check("out", out)
        if out is not x and _overlap(x, out) and not (verb in _IN_PLACE and x.data_ptr() == out.data_ptr()):
            raise ConfigError(f"out shares memory with x; {verb} needs another tensor for its result")
        with self._lock:
            if plan is None:
                self._check_dense(x, out)
                if len(self._plans) >= _MAX_PLANS:
                    self._plans.clear()
                self._plans[key] = (run, shape)
            run(x, out, self._seconds(timeout))
        return out

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        """Check what the kind of a call does not say of a tensor."""
        if tensor.device != self.device:
            raise ConfigError(f"{name} is on {tensor.device}; these virtual ranks are on {self.device}")
        if tensor.is_conj() or tensor.is_neg():
            raise ConfigError(f"{name} is conjugated or negated lazily; call .resolve_conj().resolve_neg()")
        if (tensor.requires_grad and torch.is_grad_enabled()) or has_tangent(tensor):
            raise ConfigError(f"{name} requires a gradient, which would be lost; call .detach() first")

    def _check_dense(self, *tensors: torch.Tensor) -> None:
        """Check that rows are contiguous and apart; which of them there are is checked by the launcher."""
        from tcomm.kernels.launch import is_dense

        if not all(is_dense(tensor, self.arena) for tensor in tensors):
            raise ConfigError("a kernel needs contiguous rows; call .contiguous() first")
        if any(len(tensor) > 1 and tensor.stride(0) < tensor[0].numel() for tensor in tensors):
            raise ConfigError("rows overlap; each virtual rank needs memory of its own")

    def _plan(self, verb: str, x: torch.Tensor, algorithm: str, op: str, root: int) -> _Plan:
        """What makes calls of a kind, and the shape of a rank's result."""
        from tcomm.kernels import all_reduce, exchange, reduce_scatter
        from tcomm.kernels.bound import Rebound

        if x.dim() == 0 or len(x) != self.world_size:
            raise ConfigError(
                f"x is {list(x.shape)}; it must have a row for each of {self.world_size} virtual ranks"
            )
        families = {"all_reduce": all_reduce.LAUNCHERS, "reduce_scatter": reduce_scatter.LAUNCHERS}
        launchers = families.get(verb, exchange.LAUNCHERS)
        if algorithm not in launchers:
            raise ConfigError(f"algorithm={algorithm!r} is not among {', '.join(launchers)}")
        launcher = launchers[algorithm]
        shape = tuple(x.shape[1:])
        name = f"triton:{algorithm}"
        call = CallDescription(verb, dtype_name(x.dtype), shape, op, root, algorithm=name)
        if verb == "all_reduce":
            return Rebound(
                lambda x, out, seconds: launcher(x, self.arena, op, out=out, timeout=seconds, call=call)
            ), shape
        parts, numel = self._parts(verb, x, root)
        between = (parts, op) if verb == "reduce_scatter" else (parts,)
        return Rebound(
            lambda x, out, seconds: launcher(x, out, self.arena, *between, timeout=seconds, call=call)
        ), (numel,)

    def _parts(self, verb: str, x: torch.Tensor, root: int) -> tuple[list[Parts], int]:
        """Every rank's table, and the elements of a result."""
        world = self.world_size
        numel = x[0].numel()
        if verb in {"reduce_scatter", "all_to_all"} and numel % world:
            raise ConfigError(f"x is {list(x.shape)}; a row must have a multiple of {world} elements")
        part = numel // world
        makers: dict[str, tuple[Callable[[int], Parts], int]] = {
            "reduce_scatter": (lambda rank: scatter_parts([part] * world, rank), part),
            "all_to_all": (lambda rank: exchange_parts([[part] * world] * world, rank), numel),
            "all_gather": (lambda rank: gather_parts([numel] * world, rank), world * numel),
            "broadcast": (lambda rank: broadcast_parts(numel, world, rank, root), numel),
        }
        make, size = makers[verb]
        return [make(rank) for rank in range(world)], size

    def _seconds(self, timeout: Timeout | Unset) -> float | None:
        return self.timeout if isinstance(timeout, Unset) else resolve_timeout(timeout)

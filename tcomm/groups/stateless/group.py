"""A group of ranks that torch.distributed does not know of: objects and small tensors through a store."""

from __future__ import annotations

import contextlib
import dataclasses
import socket as sockets
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from tcomm.errors import (
    CollectiveMismatchError,
    CommError,
    ConfigError,
    GroupClosedError,
    PeerLostError,
    PeerTimeoutError,
)
from tcomm.groups.arguments import check_rank, check_tensor
from tcomm.groups.stateless.barrier import Barrier
from tcomm.groups.stateless.creation import OpenedGroup, check_place, check_seconds, open_group
from tcomm.groups.stateless.mail import put_message, remove_message, take_message
from tcomm.groups.stateless.peers import describe_process, is_running
from tcomm.groups.stateless.sealed import CallThread, SealedStore
from tcomm.memory.liveness import Identity
from tcomm.memory.pause import Pause
from tcomm.objects.codec import decode, encode
from tcomm.objects.secret import job_secret

__all__ = ["StatelessProcessGroup"]

_LOOK_SECONDS = 0.25
_MANY_ENTRIES = 64
_REDUCTIONS: dict[object, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
}


@dataclasses.dataclass
class StatelessProcessGroup:
    """A few processes and a store. torch.distributed need not be initialised and does not change.

    For metadata, and for tensors of a few KiB. Objects travel without pickle and are signed with the job's
    secret where there is one. One thread at a time; the ranks make the same collective calls in one order.
    Made by `create`, or over a store that the ranks have already, which is then used below no prefix.

    Attributes:
        rank: this process.
        world_size: number of ranks.
        store: of the group alone.
        socket: always None: the store owns what it listens on.
        data_expiration_seconds: after which a message that nobody read is forgotten.
        send_dst_counter: messages sent, by destination.
        recv_src_counter: messages received, by source.
        broadcast_send_counter: broadcasts sent.
        broadcast_recv_src_counter: broadcasts received, by source.
        entries: keys of this rank's messages that may be unread, and when they were written.
        store_timeout: seconds, for calls that give no timeout.
        name: for errors.
        opened: what `create` made; None over a store of the caller's.
    """

    rank: int
    world_size: int
    store: Store
    socket: sockets.socket | None
    data_expiration_seconds: float = 3600
    send_dst_counter: dict[int, int] = dataclasses.field(default_factory=dict)
    recv_src_counter: dict[int, int] = dataclasses.field(default_factory=dict)
    broadcast_send_counter: int = 0
    broadcast_recv_src_counter: dict[int, int] = dataclasses.field(default_factory=dict)
    entries: deque[tuple[str, float]] = dataclasses.field(default_factory=deque)
    store_timeout: float = dataclasses.field(default=300.0, kw_only=True)
    name: str = dataclasses.field(default="stateless", kw_only=True)
    opened: OpenedGroup | None = dataclasses.field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        check_place(self.rank, self.world_size)
        check_seconds("store_timeout", self.store_timeout)
        check_seconds("data_expiration_seconds", self.data_expiration_seconds)
        ranks = range(self.world_size)
        self.send_dst_counter = dict.fromkeys(ranks, 0)
        self.recv_src_counter = dict.fromkeys(ranks, 0)
        self.broadcast_recv_src_counter = dict.fromkeys(ranks, 0)
        self._identities: tuple[Identity, ...] = ()
        if self.opened is None:
            self._sealed = SealedStore(self.store, job_secret(), thread=CallThread())
        else:
            self._sealed, self._identities = self.opened.sealed, self.opened.identities
        self._barriers = 0
        self._closed = False

    @staticmethod
    def create(
        host: str,
        port: int,
        rank: int,
        world_size: int,
        data_expiration_seconds: float = 3600,
        store_timeout: float = 300,
        listen_socket: sockets.socket | None = None,
        *,
        group_name: str = "stateless",
        via: Store | None = None,
    ) -> StatelessProcessGroup:
        """Meet the other ranks at an address and make a group. **Collective.**

        Rank 0 listens on `host` and nowhere else, once for all groups that it has there. Ranks may come
        again for another group of the same name once this one has come together.

        Args:
            host: where rank 0 listens; anything but loopback needs TCOMM_SECRET.
            port: likewise; 0 where `listen_socket` or `via` is given.
            rank: this process.
            world_size: number of ranks.
            data_expiration_seconds: after which a message that nobody read is forgotten.
            store_timeout: seconds until all have come, and for calls that give no timeout.
            listen_socket: rank 0's, bound and listening; owned by the group from now on.
            group_name: groups of several names can meet at one address at once.
            via: a store that the ranks have already, by which rank 0 tells the others its port.

        Raises:
            ConfigError: when an argument makes no sense, or the address needs a secret.
            OSError: on rank 0, when the address is taken by a stranger.
            DuplicateRankError: when another process has this rank.
            GroupMismatchError: when the ranks disagree about the group; shows in what.
            RendezvousError: when a rank did not come; names it, and the address.
        """
        opened = open_group(host, port, rank, world_size, group_name, store_timeout, listen_socket, via)
        return StatelessProcessGroup(
            rank, world_size, opened.sealed.store, None, data_expiration_seconds,
            store_timeout=store_timeout, name=group_name, opened=opened,
        )  # fmt: skip

    def send_obj(self, obj: object, dst: int) -> None:
        """Send an object to a rank, in the order of calls for that pair of ranks. Does not wait.

        Raises:
            ConfigError: when the rank is wrong or something in the object may not travel. Nothing was sent.
        """
        check_rank("send_obj", "dst", dst, self.world_size)
        message = encode(obj).join()
        with self._operation("send_obj", None):
            self._post(f"send_to/{self.rank}/{dst}/{self.send_dst_counter[dst]}", message)
            self.send_dst_counter[dst] += 1

    def recv_obj(self, src: int, *, timeout: float | None = None) -> object:
        """The next object that a rank sent to this one.

        Args:
            src: whose.
            timeout: seconds; None: `store_timeout`.

        Raises:
            ConfigError: when the rank is wrong.
            PeerTimeoutError, PeerLostError: when it sent nothing, or is gone.
            DecodeError: when it is no object; the next one is received nevertheless.
        """
        check_rank("recv_obj", "src", src, self.world_size)
        with self._operation("recv_obj", timeout) as deadline:
            key = f"send_to/{src}/{self.rank}/{self.recv_src_counter[src]}"
            self._wait_for(key, "recv_obj", src, deadline)
            self.recv_src_counter[src] += 1
            return decode(take_message(self._sealed, key, 1))

    def broadcast_obj(self, obj: object, src: int, *, timeout: float | None = None) -> object:
        """An object of `src` on every rank. **Collective**, but the source does not wait.

        Args:
            obj: on the source, what to send; ignored elsewhere.
            src: whose.
            timeout: seconds; None: `store_timeout`.

        Returns:
            The object; on the source the very one that was given.

        Raises:
            ConfigError: when the rank is wrong or something in the object may not travel. Nothing was sent.
            PeerTimeoutError, PeerLostError, DecodeError: as `recv_obj` does.
        """
        check_rank("broadcast_obj", "src", src, self.world_size)
        message = encode(obj).join() if self.rank == src else b""
        with self._operation("broadcast_obj", timeout) as deadline:
            if self.rank != src:
                return self._broadcast_of(src, "broadcast_obj", deadline)
            self._broadcast(message)
            return obj

    def all_gather_obj(self, obj: object, *, timeout: float | None = None) -> list[object]:
        """Every rank's object, in rank order; this rank's is the very one given. **Collective.**

        Args:
            obj: of this rank.
            timeout: seconds for all of them; None: `store_timeout`.

        Raises:
            ConfigError, PeerTimeoutError, PeerLostError, DecodeError: as `broadcast_obj` does.
        """
        message = encode(obj).join()
        with self._operation("all_gather_obj", timeout) as deadline:
            self._broadcast(message)
            return [
                obj if src == self.rank else self._broadcast_of(src, "all_gather_obj", deadline)
                for src in range(self.world_size)
            ]

    def expire_data(self) -> None:
        """Forget this rank's messages that are older than `data_expiration_seconds`, read or not."""
        oldest = time.monotonic() - self.data_expiration_seconds
        while self.entries and self.entries[0][1] < oldest:
            remove_message(self._sealed, self.entries.popleft()[0])

    def barrier(self, timeout: float | None = 30.0) -> None:
        """Wait for all ranks. **Collective.** All of them pass, or all of them raise.

        Rank 0, whose process may be the store's, waits in the end until all have seen that all have come.

        Args:
            timeout: seconds; None: `store_timeout`. A store that does not answer is given up half a second
                later.

        Raises:
            ConfigError: when the timeout is not a positive number.
            PeerTimeoutError: "Barrier timed out after ... seconds", with the ranks that did not come; on
                those too, when they come. "Barrier departure timed out after ..." on rank 0.
            PeerLostError: when one of them is gone, or the store with rank 0.
        """
        with self._operation("barrier", timeout):
            if self.world_size == 1:
                return
            number, self._barriers = self._barriers, self._barriers + 1
            seconds = self.store_timeout if timeout is None else timeout
            Barrier(self._sealed, self.rank, self.world_size, number, seconds, self._epitaph).run()
            self.expire_data()

    def broadcast(self, tensor: torch.Tensor, src: int, *, timeout: float | None = None) -> torch.Tensor:
        """A tensor of `src` on every rank: a new one, on the source the very one given. **Collective.**

        Raises:
            ConfigError, PeerTimeoutError, PeerLostError, DecodeError: as `broadcast_obj` does.
        """
        if self.rank == src:
            check_tensor("broadcast", tensor)
        return _as_tensor("broadcast", self.broadcast_obj(tensor, src, timeout=timeout), src)

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Send a tensor to a rank. Does not wait.

        Raises:
            ConfigError: when the rank or the tensor is wrong. Nothing was sent.
        """
        self.send_obj(check_tensor("send", tensor), dst)

    def recv(self, tensor: torch.Tensor, src: int, *, timeout: float | None = None) -> torch.Tensor:
        """Receive a tensor from a rank into `tensor`, and return it.

        Raises:
            CollectiveMismatchError: when what came has another shape or dtype.
            ConfigError, PeerTimeoutError, PeerLostError, DecodeError: as `recv_obj` does.
        """
        check_tensor("recv", tensor)
        came = _as_tensor("recv", self.recv_obj(src, timeout=timeout), src)
        if came.shape != tensor.shape or came.dtype != tensor.dtype:
            raise CollectiveMismatchError(
                f"recv: rank {src} sent {came.dtype} {list(came.shape)}; the tensor given is {tensor.dtype} "
                f"{list(tensor.shape)}",
                group=self.name, op="recv", rank=self.rank, peers=(src,),
            )  # fmt: skip
        with torch.no_grad():
            return tensor.copy_(came)

    def all_reduce(
        self,
        tensor: torch.Tensor,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        *,
        timeout: float | None = None,
    ) -> torch.Tensor:
        """A new tensor, reduced in rank order, so that its bits are the same everywhere. **Collective.**

        Args:
            tensor: the same shape and dtype on every rank.
            op: SUM, PRODUCT, MAX or MIN.
            timeout: seconds; None: `store_timeout`.

        Raises:
            CollectiveMismatchError: when the ranks' tensors differ in shape or dtype.
            ConfigError, PeerTimeoutError, PeerLostError, DecodeError: as `all_gather_obj` does.
        """
        check_tensor("all_reduce", tensor)
        reduce = _REDUCTIONS.get(op)
        if reduce is None:
            raise ConfigError(f"op={op} of all_reduce is none of SUM, PRODUCT, MAX and MIN")
        parts = [
            _as_tensor("all_reduce", x, r) for r, x in enumerate(self.all_gather_obj(tensor, timeout=timeout))
        ]
        kinds = [(part.dtype, tuple(part.shape)) for part in parts]
        if len(set(kinds)) > 1:
            told = "".join(
                f"\n  rank {rank}: {dtype} {list(shape)}" for rank, (dtype, shape) in enumerate(kinds)
            )
            raise CollectiveMismatchError(
                f"all_reduce of group {self.name!r}: the ranks gave different tensors{told}",
                group=self.name, op="all_reduce", rank=self.rank,
            )  # fmt: skip
        total = parts[0].to(tensor.device, copy=True)
        for part in parts[1:]:
            total = reduce(total, part.to(tensor.device))
        return total

    def close(self) -> None:
        """Let the store go, and on rank 0 what it listens on with the last group there. May be called twice.

        What peers have not read yet is lost when rank 0 closes; a `barrier` before makes sure that they have.
        """
        self._closed = True
        self.opened = None
        # An empty store in their place: nothing is held on to.
        self.store = HashStore()
        self._sealed = SealedStore(self.store)
        self.entries.clear()

    @contextlib.contextmanager
    def _operation(self, op: str, timeout: float | None) -> Iterator[float]:
        """The deadline of a call, whose errors tell of which group they are."""
        if self._closed:
            raise GroupClosedError(f"group {self.name!r} is closed", group=self.name, op=op, rank=self.rank)
        seconds = check_seconds(f"timeout of {op}", self.store_timeout if timeout is None else timeout)
        self._sealed.allow(seconds)
        try:
            yield time.monotonic() + seconds
        except CommError as error:
            error.group, error.op, error.rank = error.group or self.name, error.op or op, self.rank
            raise

    def _broadcast(self, message: bytes) -> None:
        if self.world_size > 1:
            self._post(f"broadcast_from/{self.rank}/{self.broadcast_send_counter}", message)
        self.broadcast_send_counter += 1

    def _broadcast_of(self, src: int, op: str, deadline: float) -> object:
        key = f"broadcast_from/{src}/{self.broadcast_recv_src_counter[src]}"
        self._wait_for(key, op, src, deadline)
        self.broadcast_recv_src_counter[src] += 1
        return decode(take_message(self._sealed, key, self.world_size - 1))

    def _post(self, key: str, message: bytes) -> None:
        self.expire_data()
        # Readers remove what they have read; of a long row of keys the first are looked at now and then.
        while len(self.entries) > _MANY_ENTRIES and not self._sealed.check([self.entries[0][0]]):
            self.entries.popleft()
        put_message(self._sealed, key, message)
        self.entries.append((key, time.monotonic()))

    def _wait_for(self, key: str, op: str, src: int, deadline: float) -> None:
        began = time.monotonic()
        pause, looked = Pause(), began
        while not self._sealed.check([key]):
            now = time.monotonic()
            if now - looked > _LOOK_SECONDS or now >= deadline:
                looked = now
                epitaph = self._epitaph(src)
                # What a peer wrote before it ended counts.
                if epitaph and not self._sealed.check([key]):
                    raise PeerLostError(
                        f"{op}: rank {src} ended ({epitaph}) and sent nothing more", peers=(src,)
                    )
            if now >= deadline:
                told = f" ({describe_process(self._identities[src])})" if self._identities else ""
                raise PeerTimeoutError(
                    f"{op}: rank {src}{told} sent nothing within {now - began:.2f} s", peers=(src,)
                )
            pause()

    def _epitaph(self, rank: int) -> str:
        """What is known of a rank's process when it has ended; empty while it runs, for all that is known."""
        if not self._identities or is_running(self._identities[rank]) is not False:
            return ""
        return describe_process(self._identities[rank])


def _as_tensor(op: str, value: object, src: int) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CollectiveMismatchError(
            f"{op}: rank {src} sent a {type(value).__name__} and no tensor", op=op, peers=(src,)
        )
    return value

"""Objects of a closed set of types between the ranks of a coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from tcomm.errors import UsageError
from tcomm.groups.parallel.lanes import Handle, broadcast_message
from tcomm.groups.parallel.tensor_verbs import TensorVerbs
from tcomm.groups.queue.message_queue import MessageQueue
from tcomm.objects.codec import encode

if TYPE_CHECKING:
    from tcomm.groups.parallel.lanes import Lanes

__all__ = ["CHUNK_NBYTES", "NUM_CHUNKS", "ObjectVerbs"]

CHUNK_NBYTES = 1 << 18
"""A chunk of a message queue; a longer message takes several."""
NUM_CHUNKS = 16


class ObjectVerbs(TensorVerbs):
    """What `tcomm.objects.codec` can encode: plain values, containers, arrays, tensors, registered classes.

    An object of another type is refused at its sender with the path to it, before anything is sent.
    """

    cpu_group: dist.ProcessGroup
    mq_broadcaster: MessageQueue | None
    timeout: float | None
    lanes: Lanes | None
    _queues: dict[int, MessageQueue]
    _uses_queues: bool

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        """Give every rank the object of rank `src`. **Collective.**

        Through a message queue in shared memory where the group was made with one, from any source.

        Args:
            obj: on `src`, what to give; not looked at elsewhere.
            src: rank within the group.

        Returns:
            On `src` the object itself, elsewhere a copy.

        Raises:
            UsageError: "Invalid src rank ..."
            ConfigError: on `src`, when a type is not supported; the others wait for its next call.
            DecodeError: on a reader, when what came is no object; later ones are unharmed.
        """
        self._check_alive()
        self._check_rank("broadcast_object", "src", src)
        if self.world_size == 1:
            return obj
        if self._uses_queues:
            return self._queue_from(src).broadcast_object(obj)
        message = encode(obj) if src == self.rank_in_group else None
        received = broadcast_message(self._control(), message, src)
        return received if message is None else obj

    def broadcast_object_list(
        self, obj_list: list[Any], src: int = 0, group: dist.ProcessGroup | None = None
    ) -> list[Any]:
        """Write the objects of rank `src` into everybody's list. **Collective.**

        Args:
            obj_list: of the same length on every rank.
            src: rank within the group.
            group: None, or one of this coordinator's own groups.

        Returns:
            `obj_list`.

        Raises:
            UsageError: when lengths differ, on the ranks whose length is another than the source's; when
                `obj_list` is no list, or `group` another group, before anything is sent.
        """
        if not isinstance(obj_list, list):
            raise UsageError(f"broadcast_object_list takes a list, not {type(obj_list).__name__}")
        if group is not None and group not in (self.cpu_group, self.device_group):
            raise UsageError(f"{group!r} is no group of {self.unique_name!r}; call its own coordinator")
        received = self.broadcast_object(obj_list, src)
        if not isinstance(received, list):
            raise UsageError(f"rank {src} broadcast a {type(received).__name__}, and no list, meanwhile")
        if len(received) != len(obj_list):
            raise UsageError(f"a list of {len(obj_list)} objects here, of {len(received)} on rank {src}")
        obj_list[:] = received
        return obj_list

    device_group: dist.ProcessGroup

    def send_object(self, obj: Any, dst: int) -> None:
        """Send an object to rank `dst`; a long one waits until `dst` receives.

        Raises:
            UsageError: "Invalid dst rank ...", or "Invalid destination rank. ..." for oneself.
            ConfigError: when a type is not supported; nothing was sent.
            PeerLostError, PeerTimeoutError: as `Communicator.send` does.
        """
        self._check_peer("send_object", "dst", dst)
        self._lanes().send(encode(obj), dst)

    def isend_object(self, obj: Any, dst: int) -> Handle:
        """As `send_object`, behind the caller's back; the object may be changed at once.

        Returns:
            A handle with `is_completed()` and `wait()`.
        """
        self._check_peer("isend_object", "dst", dst)
        return self._lanes().isend(encode(obj), dst)

    def recv_object(self, src: int) -> Any:
        """The next object that rank `src` sends; its arrays and tensors are this rank's own.

        Raises:
            UsageError: "Invalid src rank ...", or "Invalid source rank. ..." for oneself.
            DecodeError, PeerLostError, PeerTimeoutError: as `Communicator.recv` does.
        """
        self._check_peer("recv_object", "src", src)
        return self._lanes().recv(src)

    def create_mq_broadcaster(
        self, writer_rank: int = 0, external_writer_handle: Any = None, blocking: bool = True
    ) -> MessageQueue:
        """A message queue from `writer_rank` to all others. **Collective.**"""
        self._check_alive()
        return MessageQueue.create_from_process_group(
            self.cpu_group, CHUNK_NBYTES, NUM_CHUNKS, writer_rank, external_writer_handle, blocking
        )

    def create_single_reader_mq_broadcasters(
        self, reader_rank_in_group: int = 0, blocking: bool = False
    ) -> tuple[MessageQueue, list[Any]]:
        """A queue from every rank to one reader. **Collective.**

        Returns:
            This rank's queue, and on the reader the handles of all of them.
        """
        self._check_alive()
        return MessageQueue.create_from_process_group_single_reader(
            self.cpu_group, CHUNK_NBYTES, NUM_CHUNKS, reader_rank_in_group, blocking
        )

    def _queue_from(self, src: int) -> MessageQueue:
        """The queue that `src` writes; made when it first broadcasts, which all ranks do together."""
        queue = self._queues.get(src)
        if queue is None:
            queue = self._queues[src] = self.create_mq_broadcaster(src)
        return queue

    def _lanes(self) -> Lanes:
        if self.lanes is None:
            self._check_alive()
            raise UsageError(f"group {self.unique_name!r} has one rank: nobody to talk to")
        return self.lanes

    def _check_peer(self, verb: str, what: str, rank: int) -> None:
        self._check_alive()
        self._check_rank(verb, what, rank)
        if rank == self.rank_in_group:
            end = "destination" if what == "dst" else "source"
            raise UsageError(f"Invalid {end} rank. {end.capitalize()} rank is the same as the current rank.")

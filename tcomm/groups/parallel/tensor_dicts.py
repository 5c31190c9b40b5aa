"""Dicts with tensors in them between the ranks of a coordinator: the state of a pipeline, for example."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tcomm.errors import UsageError
from tcomm.groups.parallel.lanes import Handle, SentMessage
from tcomm.groups.parallel.object_verbs import ObjectVerbs
from tcomm.groups.parallel.tensor_dict_wire import Slicing, check_dict, pack, unpack
from tcomm.groups.parallel.tensor_verbs import TensorVerbs

__all__ = ["TensorDictVerbs"]


class TensorDictVerbs(ObjectVerbs):
    """Dicts whose values may be tensors. Tensors inside of other values travel with them, in host memory."""

    _pending_isends: collections.deque[list[Handle]]

    def broadcast_tensor_dict(
        self,
        tensor_dict: dict[Any, Any] | None = None,
        src: int = 0,
        group: dist.ProcessGroup | None = None,
        metadata_group: dist.ProcessGroup | None = None,
    ) -> dict[Any, Any] | None:
        """Give every rank the dict of rank `src`. **Collective.**

        Args:
            tensor_dict: on `src`, the dict.
            src: rank within the group.
            group: not used; a coordinator has its own.
            metadata_group: not used.

        Returns:
            On `src` the dict itself, elsewhere a new one with the keys in the same order; in a group of one,
            what was given.

        Raises:
            UsageError: "Expecting a dictionary, got ...", before anything is sent.
            ConfigError: as `broadcast_object` does.
        """
        del group, metadata_group
        self._check_alive()
        self._check_rank("broadcast_tensor_dict", "src", src)
        if self.world_size == 1:
            return None if tensor_dict is None else check_dict(tensor_dict)

        def broadcast(x: torch.Tensor) -> None:
            self._broadcast_in_place(x, src)

        if src != self.rank_in_group:
            return unpack(self.broadcast_object(None, src), Slicing(), broadcast)[0]
        packed = pack(tensor_dict, Slicing())
        self.broadcast_object(packed.message, src)
        for x in packed.on_devices:
            broadcast(x)
        return tensor_dict

    def send_tensor_dict(
        self,
        tensor_dict: dict[Any, Any],
        dst: int | None = None,
        all_gather_group: TensorVerbs | None = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> dict[Any, Any] | None:
        """Send a dict to rank `dst`, by default the next in the ring.

        Args:
            tensor_dict: the dict.
            dst: rank within the group.
            all_gather_group: a coordinator whose ranks all send the same dict. Each then sends a slice of a
                tensor whose elements divide by their number, and the receivers gather the slices.
            all_gather_tensors: by key, whether a tensor travels as a slice, where that must be another way.
                Both ends give the same.

        Returns:
            None; in a group of one, the dict.

        Raises:
            UsageError: "Invalid dst rank ...", "Expecting a dictionary, got ..."; nothing was sent.
            ConfigError, PeerLostError, PeerTimeoutError: as `send_object` does.
        """
        peer = self._peer("send_tensor_dict", "dst", dst, 1)
        slicing = _slicing(all_gather_group, all_gather_tensors)
        if self.world_size == 1:
            return check_dict(tensor_dict)
        packed = pack(tensor_dict, slicing)
        self.send_object(packed.message, peer)
        for x in packed.on_devices:
            self._device_communicator().send(x, peer)
        return None

    def isend_tensor_dict(
        self,
        tensor_dict: dict[Any, Any],
        dst: int | None = None,
        all_gather_group: TensorVerbs | None = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> list[Handle]:
        """As `send_tensor_dict`, behind the caller's back.

        Tensors in host memory have been copied when this returns. Those on a device are kept alive until
        they have been sent, and must not be written before.

        Returns:
            Handles, that of the message first; none in a group of one.
        """
        peer = self._peer("isend_tensor_dict", "dst", dst, 1)
        slicing = _slicing(all_gather_group, all_gather_tensors)
        if self.world_size == 1:
            check_dict(tensor_dict)
            return []
        while self._pending_isends and all(handle.is_completed() for handle in self._pending_isends[0]):
            self._pending_isends.popleft()
        packed = pack(tensor_dict, slicing)
        handles: list[Handle] = [self.isend_object(packed.message, peer)]
        for x in packed.on_devices:
            device = self._device_communicator()
            work = device.communicator.send(x, peer, async_op=True, algorithm=device.algorithm)
            handles.append(SentMessage([work]))
        self._pending_isends.append(handles)
        return handles

    def recv_tensor_dict(
        self,
        src: int | None = None,
        all_gather_group: TensorVerbs | None = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> dict[Any, Any] | None:
        """The next dict from rank `src`, by default the one before in the ring.

        **Collective** over `all_gather_group`, whose ranks all receive.

        Args:
            src: rank within the group.
            all_gather_group: as for `send_tensor_dict`.
            all_gather_tensors: as for `send_tensor_dict`.

        Returns:
            The dict, on this rank's devices; in a group of one, None.

        Raises:
            UsageError: "Invalid src rank ..."
            DecodeError, PeerLostError, PeerTimeoutError: as `recv_object` does.
        """
        peer = self._peer("recv_tensor_dict", "src", src, -1)
        slicing = _slicing(all_gather_group, all_gather_tensors)
        if self.world_size == 1:
            return None

        def receive(x: torch.Tensor) -> None:
            device = self._device_communicator()
            device.communicator.recv(x, peer, algorithm=device.algorithm)

        received, finish = unpack(self.recv_object(peer), slicing, receive)
        for step in finish:
            step()
        return received

    def irecv_tensor_dict(
        self,
        src: int | None = None,
        all_gather_group: TensorVerbs | None = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> tuple[dict[Any, Any] | None, list[Handle], list[Callable[[], None]]]:
        """As `recv_tensor_dict`, with tensors on a device received behind the caller's back.

        Returns:
            The dict, handles to wait for, and then functions to call in order, which gather slices.
        """
        peer = self._peer("irecv_tensor_dict", "src", src, -1)
        slicing = _slicing(all_gather_group, all_gather_tensors)
        if self.world_size == 1:
            return None, [], []
        handles: list[Handle] = []

        def receive(x: torch.Tensor) -> None:
            device = self._device_communicator()
            work = device.communicator.recv(x, peer, async_op=True, algorithm=device.algorithm)
            handles.append(work)

        received, finish = unpack(self.recv_object(peer), slicing, receive)
        return received, handles, finish


def _slicing(group: TensorVerbs | None, chosen: dict[str, bool] | None) -> Slicing:
    if group is not None and not isinstance(group, TensorVerbs):
        raise UsageError(f"all_gather_group={group!r} is no group; give a GroupCoordinator, or None")
    if chosen is not None and not isinstance(chosen, dict):
        raise UsageError(f"all_gather_tensors={chosen!r} is no dict; give one of keys to True or False")
    return Slicing(group, chosen)

"""What a reader has to be told of a queue."""

from __future__ import annotations

import dataclasses

from tcomm.groups.queue.ring import RingHandle
from tcomm.objects.codec import register

__all__ = ["Handle"]


@register
@dataclasses.dataclass
class Handle:
    """Plain data; travels to the readers by any object path."""

    local_reader_ranks: list[int]
    """Ranks of the readers on the writer's node, in the order of their lines in the ring."""
    buffer_handle: RingHandle | None = None
    """Of the ring; None where there is no local reader."""
    local_subscribe_addr: str | None = None
    """Always None: local readers need no socket, since a message of any size passes the ring."""
    remote_subscribe_addr: str | None = None
    """`tcp://host:port` where the writer listens; None where there is no remote reader."""
    remote_addr_ipv6: bool = False
    """Whether that host is an IPv6 address, which then stands in brackets."""

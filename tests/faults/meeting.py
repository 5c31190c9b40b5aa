"""Where the ranks of a fault test meet."""

from tcomm.groups.stateless.addresses import bind_listen_socket
from tcomm.groups.stateless.group import StatelessProcessGroup


def create(member, rank, world_size, name="g", timeout=20.0):
    """A stateless group at the address of this world, of which the first process binds the socket."""
    listening = None
    if member.rank == 0 and not member.store.check(["port"]):
        listening = bind_listen_socket("127.0.0.1")
        member.store.set("port", str(listening.getsockname()[1]))
    port = int(member.store.get("port"))
    return StatelessProcessGroup.create(
        "127.0.0.1", port, rank, world_size, group_name=name, store_timeout=timeout, listen_socket=listening
    )

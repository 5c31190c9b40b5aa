"""What all ranks have to know before and after one of them makes a group."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence

import msgspec
import torch.distributed as dist

from tcomm.errors import RendezvousError, UsageError
from tcomm.groups.compiled import registry
from tcomm.groups.differences import refuse_differences
from tcomm.groups.handle import SETUP_SECONDS
from tcomm.groups.setup import exchange_of

__all__ = ["agree_on_name", "making", "watch_with"]


class _Plan(msgspec.Struct, frozen=True):
    """What a rank is about to make."""

    same: dict[str, str]
    number: int
    """That the group's name would get here: ranks may have made other groups before they met."""


class _World:
    """The groups that are made of one world of torch.distributed, in their order."""

    def __init__(self, world: dist.ProcessGroup) -> None:
        self.rank = world.rank()
        self.exchange = exchange_of(world, "coordinators")
        self.store = self.exchange.store
        self.made = 0
        self.watch: Callable[[], None] | None = None
        self._known: set[int] = set()

    def agree(self, name: str, same: dict[str, str], seconds: float) -> str:
        """Compare plans, and give the group a name. **Collective.**"""

        def check() -> None:
            if self.watch is not None:
                self.watch()
            self._refuse_failed()

        plan = msgspec.json.encode(_Plan(same, registry.next_number(name)))
        gathered = self.exchange.all_gather(plan, seconds, check)
        plans = [msgspec.json.decode(payload, type=_Plan) for payload in gathered]
        refuse_differences(name, [plan.same for plan in plans])
        self.made += 1
        return registry.unique_name(name, max(plan.number for plan in plans))

    def tell_failure(self, name: str, error: BaseException) -> None:
        """Let ranks of other groups know, which come to the next group and would wait for this one."""
        self._known.add(self.made)
        told = f"rank {self.rank} could not make its group {name!r}: {type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):
            # Peers fail because one has; the first to tell is the one.
            if not self.store.check([self._failure_key()]):
                self.store.set(self._failure_key(), told.encode())

    def _refuse_failed(self) -> None:
        """Raise once when another rank could not make the group that was agreed on last."""
        if self.made in self._known or not self.store.check([self._failure_key()]):
            return
        self._known.add(self.made)
        raise RendezvousError(bytes(self.store.get(self._failure_key())).decode())

    def _failure_key(self) -> str:
        return f"{self.exchange.prefix}/failed/{self.made}"


_worlds: weakref.WeakKeyDictionary[dist.ProcessGroup, _World] = weakref.WeakKeyDictionary()


def _current_world() -> _World | None:
    group = dist.group.WORLD
    if group is None:
        return None
    return _worlds.get(group) or _worlds.setdefault(group, _World(group))


def watch_with(check: Callable[[], None] | None) -> None:
    """Call `check` now and then while ranks come to make a group of this world; it raises for the dead."""
    world = _current_world()
    if world is not None:
        world.watch = check


def agree_on_name(name: str, group: dist.ProcessGroup) -> str:
    """A unique name for a coordinator of a group that exists. **Collective** over the group."""
    mine = str(registry.next_number(name)).encode()
    numbers = exchange_of(group, f"name of {name}").all_gather(mine, SETUP_SECONDS)
    return registry.unique_name(name, max(map(int, numbers)))


@contextlib.contextmanager
def making(
    name: str,
    group_ranks: Sequence[Sequence[int]],
    backend: str,
    seconds: float | None,
) -> Iterator[str]:
    """Around the making of a group. **Collective** over the world to enter.

    torch.distributed would wait until its timeout where ranks make groups in different orders, or of
    different members, and where a rank of another group fails.

    Args:
        name: what the group is for.
        group_ranks: all groups that are made at once.
        backend: of them.
        seconds: to wait for all ranks; None: `SETUP_SECONDS`, which is the most.

    Yields:
        The group's unique name, the same on every rank.

    Raises:
        GroupMismatchError: on every rank, with a table of what differs.
        RendezvousError: when a rank did not come, or could not make the group before this one.
        UsageError: without torch.distributed.
    """
    world = _current_world()
    if world is None:
        raise UsageError("torch.distributed is not initialized; call init_distributed_environment() first")
    same = {"name": name, "groups": str([list(ranks) for ranks in group_ranks]), "backend": backend}
    limit = SETUP_SECONDS if seconds is None else min(seconds, SETUP_SECONDS)
    unique_name = world.agree(name, same, limit)
    try:
        yield unique_name
    except BaseException as error:
        world.tell_failure(unique_name, error)
        raise

"""What ranks that share memory decide as one: of all proposals for a question, the first counts.

A proposal is the target of a symbolic link in the memory file system, whose name is the question's. Making
it either succeeds whole, or somebody was first; nobody waits, and whoever dies leaves nothing half done.
Links of a group that was killed are removed by who starts a group a day later.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from tcomm.memory.channel import Channel
from tcomm.memory.control import Word
from tcomm.memory.shm import VERDICT

__all__ = ["Verdicts"]


class Verdicts:
    """The verdicts of one group. Used by one thread at a time.

    Args:
        channel: of the group.
        directory: memory file system that the ranks share.
    """

    def __init__(self, channel: Channel, directory: str) -> None:
        self._channel = channel
        nonce = channel.pages[0].words[Word.NONCE]
        self.prefix = f"{directory}/tcomm-{os.getuid()}{VERDICT}{nonce:x}"
        """Of the names of all questions."""
        self._known: list[tuple[int, str]] = []

    def find(self, epoch: int, number: int = 0) -> str | None:
        """The verdict on a question, or None where nobody has proposed one.

        Args:
            epoch: of the call that it is about.
            number: of the question in that call.
        """
        path = self._path(epoch, number)
        with contextlib.suppress(FileNotFoundError):
            told = os.readlink(path)
            if (epoch, path) not in self._known:
                self._known.append((epoch, path))
            return told
        return None

    def propose(self, told: str, epoch: int, number: int = 0) -> str:
        """The verdict on a question: `told`, unless somebody was first.

        Args:
            told: the proposal, not empty.
            epoch: as for `find`.
            number: as for `find`.
        """
        # Made at once and with its contents, or not at all: the first one counts.
        with contextlib.suppress(FileExistsError):
            os.symlink(told, self._path(epoch, number))
        verdict = self.find(epoch, number)
        if verdict is None:
            raise AssertionError("a verdict was removed before every rank had read it")
        return verdict

    def exists(self, epoch: int, number: int = 0) -> bool:
        """Whether there is a verdict on a question, which this rank then need not have read."""
        return os.path.lexists(self._path(epoch, number))

    def drop(self, epoch: int) -> None:
        """Remove the verdicts of calls before `epoch`, which all who take part have completed."""
        for _, path in (verdict for verdict in self._known if verdict[0] < epoch):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._known = [verdict for verdict in self._known if verdict[0] >= epoch]

    def close(self, peers: Iterable[int]) -> None:
        """Remove what nobody will read any more: the last rank to leave removes what is left.

        Args:
            peers: who may still read a verdict, unless they are gone by now.
        """
        channel = self._channel
        alive = [peer for peer in peers if not channel.is_gone(peer)]
        self.drop(min((channel.pages[peer].words[Word.EPOCH] for peer in alive), default=1 << 32) + 1)

    def _path(self, epoch: int, number: int) -> str:
        return f"{self.prefix}-{epoch}-{number}"

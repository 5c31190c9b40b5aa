"""`tcomm inspect`: what a process waits for, read from outside while it hangs."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import torch

from tcomm.memory.control import CONTROL_BYTES, LAYOUT_VERSION, MAGIC, ControlPage, PoisonCode, Word

__all__ = ["inspect_process"]


def inspect_process(pid: int) -> list[dict[str, Any]]:
    """The control page of every group that process `pid` is in, as this moment finds it.

    The pages have no name any more; their owner keeps one descriptor of each, which `/proc` opens for
    whoever may read that process's memory.

    Raises:
        PermissionError, FileNotFoundError: when there is no such process, or it is somebody else's.
    """
    found = []
    for fd in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
        path = pathlib.Path(f"/proc/{pid}/fd/{fd}")
        try:
            is_page = "/tcomm-" in os.readlink(path) and path.stat().st_size == CONTROL_BYTES
        except OSError:
            continue
        if is_page and (status := _status(path)):
            found.append(status)
    return found


def _status(path: pathlib.Path) -> dict[str, Any] | None:
    page = ControlPage(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8))
    words = page.words
    if words[Word.MAGIC] != MAGIC:
        return None
    if (version := words[Word.LAYOUT_VERSION]) != LAYOUT_VERSION:
        return {"state": f"not read: its page has layout {version}, and that of this tcomm {LAYOUT_VERSION}"}
    epoch = words[Word.EPOCH]
    waiting = words[Word.WAITING_FOR]
    call = page.description((epoch + bool(waiting)) & 1)
    return {
        "rank": words[Word.RANK],
        "world_size": words[Word.WORLD_SIZE],
        "pid": words[Word.PID],
        "completed": epoch,
        "last call": str(call) if call else "none",
        "waiting for rank": waiting - 1 if waiting else None,
        "state": PoisonCode(words[Word.POISON_CODE]).name.lower(),
        "left": page.leaving_reason,
    }

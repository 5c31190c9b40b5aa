import json
import os
import subprocess
import sys

import pytest
import torch

from tcomm.memory import farewell
from tcomm.memory.control import CONTROL_BYTES, ControlPage, Word

_ENDINGS = {
    "last line": ("", "its process exited"),
    "exit code": ("sys.exit(3)", "its process exited"),
    "exception": ("raise ValueError('no such model')", "ValueError: no such model"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
    "closed before": ("cancel_leaving(page)", None),
    "hard exit": ("os._exit(0)", None),
    "killed": ("os.kill(os.getpid(), 9)", None),
    "child of it ends": ("if os.fork() == 0: sys.exit(0)\nos.wait()\nos._exit(0)", None),
    "left before": ("page.leave('it closed the group')\nraise ValueError", "it closed the group"),
    "page is gone": ("del page", None),
}
_PROGRAM = """
import gc, json, os, sys, torch
from tcomm.memory.control import CONTROL_BYTES, ControlPage
from tcomm.memory.farewell import announce_leaving, cancel_leaving

directory, endings = sys.argv[1], json.loads(sys.argv[2])
# What was imported is not looked through at the end of each child.
gc.freeze()
for name, ending in endings.items():
    if os.fork() == 0:
        path = f"{directory}/{name}"
        storage = torch.UntypedStorage.from_file(path, True, CONTROL_BYTES)
        page = ControlPage(torch.empty(0, dtype=torch.uint8).set_(storage))
        del storage
        page.initialise(0, 2, 1, os.getpid(), 1)
        announce_leaving(page)
        exec(ending)
        break
else:
    for _ in endings:
        os.wait()
"""


@pytest.fixture(scope="module")
def reasons(tmp_path_factory):
    """What processes that end in each of these ways leave in their pages."""
    directory = tmp_path_factory.mktemp("pages")
    endings = json.dumps({name: ending for name, (ending, _) in _ENDINGS.items()})
    subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(directory), endings],
        capture_output=True,
        timeout=60,
        check=True,
    )
    found = {}
    for name in _ENDINGS:
        storage = torch.UntypedStorage.from_file(str(directory / name), True, CONTROL_BYTES)
        found[name] = ControlPage(torch.empty(0, dtype=torch.uint8).set_(storage)).leaving_reason
    return found


@pytest.mark.parametrize("name", _ENDINGS)
def test_a_page_says_why_its_process_ended(reasons, name):
    assert reasons[name] == _ENDINGS[name][1]


_kept = []


def _child_exits(member):
    arena = member.arena()
    _kept.append(arena)
    if member.rank == 1:
        raise SystemExit(3)
    page = arena.channel.pages[1]
    while page.leaving_reason is None:
        os.sched_yield()
    return page.leaving_reason


def test_a_child_of_multiprocessing_says_so_too(on_ranks):
    outcomes = on_ranks(2, _child_exits, check=False)
    assert outcomes[0].value == "SystemExit: 3"


def test_the_page_of_another_process_is_left_alone():
    page = ControlPage(torch.zeros(CONTROL_BYTES, dtype=torch.uint8))
    page.words[Word.PID] = os.getpid() + 1
    farewell._pages.add(page)
    try:
        farewell._leave("it is over")
        assert page.leaving_reason is None
        page.words[Word.PID] = os.getpid()
        farewell._leave("it is over")
        assert page.leaving_reason == "it is over"
    finally:
        farewell.cancel_leaving(page)

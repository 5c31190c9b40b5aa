"""Runs pytest again and again, each time in a fork of this process, which has imported what takes long.

Reads lines of JSON: a file for what pytest prints, and pytest's arguments. Answers with two lines: the
process group of the run, and its exit code when it has ended. A program of its own: no module of the tree is
imported here, so every run finds the tree as it is then.
"""

import gc
import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import msgspec  # noqa: F401
import pytest
import torch.distributed  # noqa: F401
import triton.language  # noqa: F401


def _run(log: str, arguments: list[str]) -> int:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    return int(pytest.main(arguments))


def _answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main() -> None:
    gc.freeze()
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        pid = os.fork()
        if not pid:
            code = 70
            try:
                code = _run(log, arguments)
            finally:
                sys.stdout.flush()
                os._exit(code)
        _answer(pid)
        _answer(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    # Triton's bindings would complain of what is left, at length.
    os._exit(0)


if __name__ == "__main__":
    main()

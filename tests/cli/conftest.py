import itertools
import subprocess
import sys

import pytest


@pytest.fixture
def forked_ranks(monkeypatch, programs, tmp_path):
    """Ranks of commands are forked from the rank server, but for those that mpirun starts.

    What they write is in the files `rank-*.out` and `rank-*.err` of the directory that this gives.
    """
    popen, numbers = subprocess.Popen, itertools.count()

    def start(command, **options):
        if command[0] != sys.executable:
            return popen(command, **options)
        return programs.start(command, output=tmp_path / f"rank-{next(numbers)}", **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    return tmp_path

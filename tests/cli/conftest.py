import subprocess
import sys

import pytest


@pytest.fixture
def forked_ranks(monkeypatch, programs):
    """Ranks of commands are forked from the rank server, but for those that mpirun starts."""
    popen = subprocess.Popen

    def start(command, **options):
        return (programs.start if command[0] == sys.executable else popen)(command, **options)

    monkeypatch.setattr(subprocess, "Popen", start)

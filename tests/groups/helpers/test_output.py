import io
import os
import sys

import pytest

from tcomm.groups.helpers.output import suppress_stdout


@pytest.fixture
def stdout(tmp_path, monkeypatch):
    monkeypatch.delenv("TCOMM_LOGGING_LEVEL", raising=False)
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    with (tmp_path / "out").open("w+") as file:
        yield file


def _say(file):
    print("python", file=file)
    os.write(file.fileno(), b"c code\n")


@suppress_stdout()
def _say_and_fail(file):
    _say(file)
    raise KeyError


def _written(file):
    file.flush()
    file.seek(0)
    return file.read()


def test_nothing_comes_out_meanwhile_and_all_comes_out_around_it(stdout, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stdout)
    print("before", file=stdout)
    descriptors = len(os.listdir("/proc/self/fd"))
    with suppress_stdout():
        _say(stdout)
    with pytest.raises(KeyError):
        _say_and_fail(stdout)
    print("after", file=stdout)
    assert _written(stdout) == "before\nafter\n"
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("variable", ["TCOMM_LOGGING_LEVEL", "VLLM_LOGGING_LEVEL"])
def test_while_debugging_everything_comes_out(stdout, monkeypatch, variable):
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv(variable, "debug")
    with suppress_stdout():
        print("python", file=stdout)
    assert _written(stdout) == "python\n"


@pytest.mark.parametrize("stream", [None, io.StringIO(), object()])
def test_without_a_descriptor_it_does_nothing(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    with suppress_stdout():
        done = True
    with pytest.raises(OSError, match="of the body"), suppress_stdout():
        raise OSError("of the body")
    assert done

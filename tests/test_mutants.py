import os
import signal
import subprocess
import sys
import time

import pytest

from tests import mutants

TOY = '''
import contextlib

__all__ = ["Box", "careful", "opened", "watched"]


def watched(x):
    """Kept."""
    y = x + 1
    return y


def careful(x):
    """Nobody looks."""
    return x


@contextlib.contextmanager
def opened(log):
    log.append("in")
    try:
        yield 7
    finally:
        log.append("out")


def _private():
    return 1


class Box:
    def __init__(self, x):
        self.x = x

    @property
    def width(self):
        """Kept too."""
        @contextlib.contextmanager
        def inner():
            yield
        return self.x

    def nothing(self):
        """Does nothing already."""

    def _hidden(self):
        return 2
'''
TOY_TESTS = """
from toy.a.b import Box, opened, watched

def test_watched():
    assert watched(1) == 2

def test_opened():
    log = []
    with opened(log) as seven:
        assert seven == 7
    assert log == ["in", "out"]

def test_box():
    assert Box(3).width == 3
"""
NAMES = ["watched", "careful", "opened", "Box.__init__", "Box.width"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    for folder, name, text in (("toy/a", "b.py", TOY), ("tests/a", "test_b.py", TOY_TESTS)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text(text)
    monkeypatch.setattr(mutants, "COPIED", ("toy", "tests"))
    return tmp_path


def test_what_is_public_and_does_something_is_emptied(toy):
    found = mutants.targets_in(toy, ("toy", "missing.py"))
    assert [target.name for target in found] == NAMES
    assert str(found[-1]) == "toy.a.b.Box.width"


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("watched", 'def watched(x):\n    """Kept."""\n    return None\n'),
        ("opened", "@contextlib.contextmanager\ndef opened(log):\n    yield\n"),
        ("Box.__init__", "    def __init__(self, x):\n        return None\n"),
        (
            "Box.width",
            '    def width(self):\n        """Kept too."""\n        return None\n\n    def nothing',
        ),
    ],
)
def test_an_emptied_function_keeps_what_stands_before_its_body(name, function):
    source = mutants.emptied(TOY, name)
    assert function in source
    before, after = TOY.splitlines(), source.splitlines()
    assert [line for line in before if line in after] == [line for line in after if line in before]


def test_a_survivor_is_named_and_is_an_error_and_the_tree_stays_as_it_was(toy, capsys):
    assert mutants.main(["--root", str(toy), "--under", "toy"]) == 1
    out = capsys.readouterr().out
    table = {line.split()[0]: line.split()[1] for line in out.splitlines() if line.strip().startswith("toy.")}
    assert table == {
        "toy.a.b.Box.__init__": "tests/a/test_b.py::test_box",
        "toy.a.b.Box.width": "tests/a/test_b.py::test_box",
        "toy.a.b.careful": "SURVIVED",
        "toy.a.b.opened": "tests/a/test_b.py::test_opened",
        "toy.a.b.watched": "tests/a/test_b.py::test_watched",
    }
    assert "5 emptied, 1 survived" in out
    assert (toy / "toy/a/b.py").read_text() == TOY


def test_names_are_selected_and_nothing_is_run_to_list_them(toy, capsys):
    assert mutants.main(["--root", str(toy), "--under", "toy", "--list", "*.Box.*"]) == 0
    assert capsys.readouterr().out.split() == ["toy.a.b.Box.__init__", "toy.a.b.Box.width"]
    assert mutants.main(["--root", str(toy), "--under", "toy", "*.nobody"]) == 2


def test_tests_that_fail_anyway_are_refused(toy):
    (toy / "tests/a/test_b.py").write_text("def test_wrong():\n    assert False\n")
    with pytest.raises(SystemExit, match=r"with nothing emptied, this fails: tests/a/test_b\.py::test_wrong"):
        mutants.main(["--root", str(toy), "--under", "toy", "*.watched"])


def test_a_module_without_tests_survives_and_may_have_some_elsewhere(toy, monkeypatch, capsys):
    (toy / "tests/a/test_b.py").rename(toy / "tests/a/test_all.py")
    only = ["--root", str(toy), "--under", "toy", "*.watched"]
    assert mutants.main(only) == 1
    assert "1 emptied, 1 survived" in capsys.readouterr().out
    monkeypatch.setattr(mutants, "MORE_TESTS", {"toy/a": ("tests/a/test_all.py",)})
    assert mutants.main(only) == 0
    assert "tests/a/test_all.py::test_watched" in capsys.readouterr().out


def _wait(is_so):
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def _is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_ctrl_c_ends_the_tests_that_are_running(toy):
    started = toy / "started"
    endless = (
        f"import os, time\ndef test_endless():\n    open({str(started)!r}, 'w').write(str(os.getpid()))\n"
    )
    (toy / "tests/a/test_b.py").write_text(endless + "    time.sleep(100)\n")
    arguments = ["--root", str(toy), "--under", "toy", "*.watched"]
    program = f"from tests import mutants; mutants.COPIED = ('toy', 'tests'); mutants.main({arguments})"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=mutants.ROOT, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        _wait(lambda: started.exists() and started.read_text())
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) != 0
    finally:
        process.kill()
    _wait(lambda: _is_gone(int(started.read_text())))


def test_tests_that_do_not_end_are_ended_and_count_as_red(toy, tmp_path):
    (toy / "tests/a/test_c.py").write_text("import time\ndef test_endless():\n    time.sleep(100)\n")
    copy = mutants.Copy(toy, tmp_path / "copy")
    try:
        assert copy.run_tests(["tests/a/test_c.py"], 1.0) == "still running after 1 s"
        assert copy.run_tests(["tests/a/test_b.py"], 60.0) == ""
    finally:
        copy.close()

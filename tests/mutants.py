"""Empties one public function of the group layer at a time and expects its tests to notice: `make mutants`.

The function keeps its signature and docstring, and does nothing. This happens in a copy of the tree, where
the test file that mirrors the module is run until its first failure. A name that no test misses is a
survivor, and survivors are an error.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import json
import os
import pathlib
import py_compile
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).parent.parent
LAYER = (
    "tcomm/functional.py",
    "tcomm/objects",
    "tcomm/eplb",
    *(
        f"tcomm/groups/{room}"
        for room in ("helpers", "stateless", "queue", "moe", "all2all", "device", "compiled", "parallel")
    ),
)
"""What is emptied unless something else is asked for."""
_parsing = threading.Lock()
"""Python 3.11 counts the depth of all threads' trees in one number: where they mix, SystemError."""
MORE_TESTS: dict[str, tuple[str, ...]] = {
    "tcomm/groups/moe/layers": ("tests/groups/moe/layers/test_layers.py",),
    "tcomm/groups/queue": ("tests/groups/queue/test_message_queue.py", "tests/groups/queue/test_remote.py"),
}
"""Test files of a module, or of all modules of a folder, beside those that mirror them."""
OF_INTEREST = {"__init__", "__post_init__", "_verify_args", "_make_all2all_kwargs"}
"""Methods that begin with an underscore and are emptied too."""
COPIED = ("tcomm", "tests", "examples", "pyproject.toml")
SECONDS = 300.0


@dataclasses.dataclass(frozen=True, order=True)
class Target:
    """A function or method to empty."""

    path: str
    """Its module's file, below the root."""
    name: str
    """Such as `Class.method`."""

    def __str__(self) -> str:
        return f"{self.path.removesuffix('.py').replace('/', '.')}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the tests said to an emptied function."""

    target: Target
    by: str
    """The test that failed first; empty when none did."""
    seconds: float


def targets_in(root: pathlib.Path, places: tuple[str, ...]) -> list[Target]:
    """The public functions and methods of all modules below `places` that do something."""
    found = []
    for place in places:
        path = root / place
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.exists()
        for file in files:
            relative = str(file.relative_to(root))
            found += [Target(relative, name) for name in _names(ast.parse(file.read_text()))]
    return found


def _names(tree: ast.Module) -> Iterator[str]:
    public = _listed(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in public and _does_something(node):
            yield node.name
        if isinstance(node, ast.ClassDef) and node.name in public and not _is_protocol(node):
            yield from (f"{node.name}.{method.name}" for method in _methods(node))


def _listed(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def _is_protocol(node: ast.ClassDef) -> bool:
    return any("Protocol" in ast.unparse(base) for base in node.bases)


def _methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or not _does_something(method):
            continue
        if method.name in OF_INTEREST or not method.name.startswith("_"):
            yield method


def _does_something(node: ast.FunctionDef) -> bool:
    if any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list):
        return False
    return [ast.unparse(statement) for statement in _body(node)] not in (
        [],
        ["..."],
        ["pass"],
        ["return None"],
    )


def _body(node: ast.FunctionDef) -> list[ast.stmt]:
    """The statements behind the docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def emptied(source: str, name: str) -> str:
    """The source with the function `name` doing nothing."""
    with _parsing:
        tree = ast.parse(source)
    node = _find(tree, name.split("."))
    body = _body(node)
    # A decorated function begins at its decorators, not at its def.
    first = min([body[0].lineno, *(d.lineno for d in getattr(body[0], "decorator_list", []))])
    nothing = "yield" if _is_generator(node) else "return None"
    lines = source.splitlines(keepends=True)
    lines[first - 1 : body[-1].end_lineno] = [" " * body[0].col_offset + nothing + "\n"]
    return "".join(lines)


def _find(tree: ast.Module, path: list[str]) -> ast.FunctionDef:
    scope: ast.Module | ast.ClassDef | ast.FunctionDef = tree
    for part in path:
        found = [
            node
            for node in scope.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
            and node.name == part
            and not (isinstance(node, ast.FunctionDef) and not _does_something(node))
        ]
        scope = found[0]
    assert isinstance(scope, ast.FunctionDef), path
    return scope


def _is_generator(node: ast.FunctionDef) -> bool:
    return any("contextmanager" in ast.unparse(decorator) for decorator in node.decorator_list)


def tests_of(root: pathlib.Path, path: str) -> list[str]:
    """The test files of a module: `package/a/b.py` has `tests/a/test_b.py`."""
    parts = pathlib.PurePath(path).parts
    mirror = str(pathlib.PurePath("tests", *parts[1:-1], f"test_{parts[-1]}"))
    more = MORE_TESTS.get(path, MORE_TESTS.get(os.path.dirname(path), ()))
    return [file for file in dict.fromkeys((mirror, *more)) if (root / file).exists()]


class Copy:
    """A copy of the tree, and a process that runs its tests."""

    def __init__(self, root: pathlib.Path, path: pathlib.Path) -> None:
        self.path = path
        path.mkdir()
        for name in filter(lambda name: (root / name).exists(), COPIED):
            _copy(root / name, path / name)
        # Sources change faster than the times by which bytecode is told to be old.
        compileall.compile_dir(path, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        # Its imports take longer than most tests; without -P, the tests' folders would pass for packages.
        self._server = subprocess.Popen(
            [sys.executable, "-P", str(pathlib.Path(__file__).with_name("warm_pytest.py"))],
            cwd=path, env={**os.environ, "PYTHONPATH": str(path)}, start_new_session=True, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._group = 0

    def run_tests(self, files: list[str], seconds: float) -> str:
        """The first test that failed; empty when all passed."""
        log = self.path / "pytest.log"
        options = ["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
        self._server.stdin.write(json.dumps([str(log), *options, *files]).encode() + b"\n")
        self._group = self._answer()
        in_time = select.select([self._server.stdout], [], [], seconds)[0]
        if not in_time:
            self.stop()
        code, self._group = self._answer(), 0
        if not in_time:
            return f"still running after {seconds:g} s"
        if code == 0:
            return ""
        text = log.read_text(errors="replace")
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
        return failed[1] if failed else f"pytest ended with {code}: {text.strip()[-300:]}"

    def _answer(self) -> int:
        # Unbuffered, or select would not see what has been read ahead.
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that runs the tests of {self.path} has ended")
        return int(line)

    def stop(self) -> None:
        """End the tests that are running, if any are."""
        if self._group:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, signal.SIGKILL)

    def close(self) -> None:
        """End the process."""
        self.stop()
        self._server.communicate()


class Copies:
    """Copies of the tree, one for each mutant that is looked at at a time."""

    def __init__(self, root: pathlib.Path, directory: str, number: int) -> None:
        self._all = [Copy(root, pathlib.Path(directory) / str(index)) for index in range(number)]
        self._free = list(self._all)

    @contextlib.contextmanager
    def one(self) -> Iterator[Copy]:
        copy = self._free.pop()
        try:
            yield copy
        finally:
            self._free.append(copy)

    def stop(self) -> None:
        """End the tests that are running."""
        for copy in self._all:
            copy.stop()

    def close(self) -> None:
        """End what they run."""
        for copy in self._all:
            copy.close()


def _copy(source: pathlib.Path, goal: pathlib.Path) -> None:
    if source.is_dir():
        shutil.copytree(source, goal, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, goal)


def judge(copies: Copies, target: Target, seconds: float) -> Verdict:
    """Empty the function, run its tests, and put it back."""
    with copies.one() as copy:
        started = time.monotonic()
        file, files = copy.path / target.path, tests_of(copy.path, target.path)
        if not files:
            return Verdict(target, "", 0.0)
        source = file.read_text()
        file.write_text(emptied(source, target.name))
        try:
            by = copy.run_tests(files, seconds)
        finally:
            file.write_text(source)
    return Verdict(target, by, time.monotonic() - started)


def refuse_failing(
    copies: Copies,
    pool: concurrent.futures.Executor,
    targets: list[Target],
    seconds: float,
    root: pathlib.Path,
) -> None:
    """Leave with a word when tests fail although nothing is emptied."""

    def run(files: tuple[str, ...]) -> str:
        with copies.one() as copy:
            return copy.run_tests(list(files), seconds)

    suites = {tuple(tests_of(root, target.path)) for target in targets} - {()}
    if failed := [by for by in pool.map(run, sorted(suites)) if by]:
        raise SystemExit(f"with nothing emptied, this fails: {', '.join(failed)}")


def table_of(verdicts: list[Verdict]) -> Table:
    """A row for each name."""
    table = Table(box=None)
    for title in ("name", "caught by", "s"):
        table.add_column(title, overflow="fold", justify="right" if title == "s" else "left")
    for verdict in sorted(verdicts, key=lambda verdict: verdict.target):
        by = verdict.by.replace("[", r"\[") or "[bold red]SURVIVED[/]"
        table.add_row(str(verdict.target), by, f"{verdict.seconds:.1f}")
    return table


def main(arguments: list[str] | None = None) -> int:
    """The number that the process ends with: 1 when something survived."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="patterns of full names, such as '*.GroupCoordinator.*'")
    parser.add_argument("--under", action="append", help="file or folder; default: the group layer")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="of the tree")
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="until a run counts as noticed")
    parser.add_argument("--list", action="store_true", help="only say what would be emptied")
    options = parser.parse_args(arguments)
    patterns = options.names or ["*"]
    targets = [
        target
        for target in targets_in(options.root, tuple(options.under or LAYER))
        if any(fnmatch.fnmatch(str(target), pattern) for pattern in patterns)
    ]
    console = Console() if Console().is_terminal else Console(width=200)
    if options.list or not targets:
        console.print("\n".join(map(str, targets)) or "nothing to empty", highlight=False, soft_wrap=True)
        return 0 if targets else 2
    with tempfile.TemporaryDirectory(prefix="tcomm-mutants-") as directory:
        copies = Copies(options.root, directory, options.jobs)
        try:
            verdicts = _judge_all(copies, targets, options, console)
        finally:
            copies.close()
    console.print(table_of(verdicts))
    survivors = sum(not verdict.by for verdict in verdicts)
    console.print(f"{len(verdicts)} emptied, {survivors} survived")
    return 1 if survivors else 0


def _judge_all(copies: Copies, targets: list[Target], options, console: Console) -> list[Verdict]:
    verdicts = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        try:
            refuse_failing(copies, pool, targets, options.seconds, options.root)
            for done in concurrent.futures.as_completed(
                [pool.submit(judge, copies, target, options.seconds) for target in targets]
            ):
                verdicts.append(done.result())
                by = verdicts[-1].by or "SURVIVED"
                console.print(f"{len(verdicts)}/{len(targets)} {verdicts[-1].target}: {by}", markup=False)
        except BaseException:
            # Ctrl-C, or a bug: nobody waits for the rest, and no tests stay behind.
            pool.shutdown(wait=False, cancel_futures=True)
            copies.stop()
            raise
    return verdicts


if __name__ == "__main__":
    raise SystemExit(main())

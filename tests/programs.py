"""Python programs as forks of the rank server, in which what they import is imported already.

A program whose start is what is tested is started by `subprocess` instead.
"""

import os
import pathlib
import runpy
import subprocess
import sys
import time
import traceback

import torch.distributed as dist

STREAMS = ("out", "err")


class Program:
    """What `subprocess.Popen` gives, of `[python, "-c" | "-m" | script, ...]`.

    Args:
        server: the rank server.
        command: as for Popen.
        env: all variables; as they are when it is None.
        cwd: directory; of the rank server when it is empty.
        output: beginning of the names of files for what it writes; the server's streams when it is None.
        options: of Popen, without meaning here.
    """

    def __init__(self, server, command, *, env=None, cwd="", output=None, **options):
        assert command[0] == sys.executable, command
        assert set(options) <= {"stdin"}, options
        self.args = [str(word) for word in command]
        variables = dict(os.environ if env is None else env)
        self._process = server.fork(_run, self.args[1:], variables, str(cwd), output and str(output))
        self.pid = self._process.pid

    @property
    def returncode(self):
        """None while it runs."""
        return self._process.exitcode

    def poll(self):
        """The same, as a call."""
        return self._process.exitcode

    def wait(self, timeout=None):
        """Its exit code; TimeoutExpired when there is none yet."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def terminate(self):
        """Ask it to end."""
        self._process.terminate()

    def kill(self):
        """End it."""
        self._process.kill()


class Programs:
    """Programs of a test, whose words go to files in a directory."""

    def __init__(self, server, directory):
        self._server = server
        self._directory = directory

    def start(self, command, **options):
        """A `Program`, as `subprocess.Popen` would start one."""
        return Program(self._server, command, **options)

    def run(self, *arguments, env=None, cwd="", timeout=100.0):
        """What `subprocess.run` gives of `python *arguments`."""
        return self._run([(arguments, env)], cwd, timeout)[0]

    def torchrun(self, world_size, *arguments, env, timeout=100.0):
        """The same of the ranks of `python *arguments`, joined as torchrun joins them."""
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        joined = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "WORLD_SIZE": str(world_size),
        }
        ranks = [{**env, **joined, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
        return self._run([(arguments, rank) for rank in ranks], "", timeout)

    def _run(self, started, cwd, timeout):
        outputs = [self._directory / f"output-{time.monotonic_ns()}-{rank}" for rank in range(len(started))]
        programs = [
            self.start([sys.executable, *arguments], env=env, cwd=cwd, output=output)
            for (arguments, env), output in zip(started, outputs, strict=True)
        ]
        deadline = time.monotonic() + timeout
        try:
            codes = [program.wait(max(0.1, deadline - time.monotonic())) for program in programs]
        finally:
            for program in programs:
                program.kill()
        return [
            subprocess.CompletedProcess(
                program.args, code, *(_file(output, name).read_text() for name in STREAMS)
            )
            for program, code, output in zip(programs, codes, outputs, strict=True)
        ]


def _file(output, name):
    return pathlib.Path(f"{output}.{name}")


def _run(arguments, variables, cwd, output):
    os.environ.clear()
    # The server's kernels are interpreted ones.
    os.environ.update(variables, TRITON_INTERPRET="1")
    if cwd:
        os.chdir(cwd)
    if output is not None:
        for stream, name in enumerate(STREAMS, 1):
            os.dup2(os.open(_file(output, name), os.O_WRONLY | os.O_CREAT), stream)
    try:
        _run_as_main(*arguments)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def _run_as_main(first, *others):
    if first in ("-c", "-m"):
        what, *others = others
    sys.argv = [first, *others]
    if first == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(pathlib.Path(first).parent))
        runpy.run_path(first, run_name="__main__")

import os
import subprocess
import sys

import pytest

SCRIPT = "import os, sys; print(sys.argv, os.environ['A'], os.getcwd()); sys.exit(int(sys.argv[1]))"


def test_a_program_gets_what_it_is_given_and_gives_what_an_interpreter_gives(programs, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for command, name in ((["-c", SCRIPT], "-c"), ([script], str(script))):
        done = programs.run(*command, 3, env={"A": "b"}, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (3, f"{[name, '3']} b {tmp_path}\n")
    done = programs.run("-c", "import no_module")
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'no_module'\n")
    assert done.stdout == ""


def test_a_program_may_be_waited_for_and_killed(programs):
    program = programs.start([sys.executable, "-c", "import time; time.sleep(60)"])
    assert program.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.05)
    os.kill(program.pid, 0)
    program.kill()
    assert program.wait(20) == -9
    assert program.returncode == program.poll() == -9


def test_ranks_find_one_another(programs):
    # Who left at once would be gone before the other had come.
    code = "import torch.distributed as d; d.init_process_group('gloo'); print(d.get_rank()); d.barrier()"
    for _ in range(2):
        ranks = programs.torchrun(2, "-c", code, env=dict(os.environ))
        assert [rank.stdout for rank in ranks] == ["0\n", "1\n"], ranks

"""Scripts as users write them, under torchrun."""

import os
import pathlib
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parent.parent


def _torchrun(script, ranks, timeout=100):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=timeout, check=False, env=environment
    )


def _written(tmp_path, source):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    return script


def test_a_module_level_communicator_that_nobody_closes_ends_cleanly(tmp_path, programs):
    source = """
        import torch, torch.distributed as dist, tcomm
        dist.init_process_group("gloo")
        comm = tcomm.Communicator()
        assert comm.all_reduce(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
        comm.all_reduce(torch.ones(3), algorithm="torch")
        dist.destroy_process_group()
        print("end", flush=True)
    """
    script = _written(tmp_path, source)
    done = _torchrun(script, 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("end") == 2
    # What it left, if anything, is not in the way of the next.
    for done in programs.torchrun(2, str(script), env=dict(os.environ)):
        assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_the_variable_forces_the_kernels_and_ranks_with_different_variables_are_told_which(
    tmp_path, programs
):
    source = """
        import os, torch, torch.distributed as dist, tcomm
        dist.init_process_group("gloo")
        with tcomm.Communicator() as comm:
            assert comm.all_reduce(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
            assert comm.explain("all_reduce", nbytes=12).algorithm == "triton:two_shot"
        from tcomm.kernels.launch import launches
        assert dict(launches) == {"_two_shot_all_reduce_kernel": 1}, launches
        for variable, values in (
            ("TCOMM_ALGORITHM", ("cpu", "torch")), ("TCOMM_STAGING_BYTES", ("1048576", "2097152"))
        ):
            os.environ[variable] = values[dist.get_rank()]
            try:
                tcomm.Communicator()
            except tcomm.GroupMismatchError as error:
                print("refused:", str(error).splitlines()[1].strip(), flush=True)
            del os.environ[variable]
        dist.destroy_process_group()
    """
    variables = {**os.environ, "TCOMM_ALGORITHM": "triton:two_shot"}
    for done in programs.torchrun(2, str(_written(tmp_path, source)), env=variables):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("refused: TCOMM_ALGORITHM:") == 1
        assert done.stdout.count("refused: TCOMM_STAGING_BYTES:") == 1

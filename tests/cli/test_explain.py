import random
import re

import pytest
import torch
from typer.testing import CliRunner

from tcomm.algorithms import FAMILIES, GPU_ALGORITHMS
from tcomm.cli.app import app
from tcomm.cli.bench import parse_sizes
from tcomm.cli.cases import VERBS
from tcomm.cli.explain import Question, answers
from tcomm.config import Config
from tcomm.errors import CapabilityError, ConfigError
from tcomm.groups.communicator import Communicator
from tcomm.groups.jobs import JOBS, Caller
from tcomm.memory.regions import Regions
from tcomm.presets import PRESETS, named_topology
from tcomm.tuning.choose import Capabilities
from tcomm.tuning.decision import decode_decisions
from tcomm.tuning.table import Row, Table, load_table

runner = CliRunner()

ASKED_FOR = ("h100x8", "b200x8", "h100x8-no-multicast", "2xh100x8", "pcie2")
BACKENDS = (("cpu", "gloo"), ("cuda", "nccl"))


def _communicator(topology, config, table):
    """One rank's hold on a group of GPUs that are not there: all that choices depend on, and nothing else."""
    comm = Communicator.__new__(Communicator)
    comm.config, comm.table = config, table
    comm.capabilities = Capabilities(torch_backends=BACKENDS, topology=topology)
    comm.world_size, comm._foreign = topology.world_size, "it is not there"
    return comm


def _explain(*args):
    result = runner.invoke(app, ["explain", *args])
    if isinstance(result.exception, (CapabilityError, ConfigError)):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1KiB..8KiB", (1024, 2048, 4096, 8192)),
        ("1KiB..7KiB", (1024, 2048, 4096)),
        ("3..24", (3, 6, 12, 24)),
        ("4KiB..4KiB", (4096,)),
        ("1, 1KiB .. 2KiB,5", (1, 1024, 2048, 5)),
        ("0", (0,)),
    ],
)
def test_two_dots_double(text, sizes):
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0..4", "'0..4' is not a range of sizes; give a positive one and a larger one"),
        ("8..4", "'8..4' is not a range of sizes"),
        ("..4", "'' is not a size"),
        ("1..", "'' is not a size"),
        ("1..2..4", "'2..4' is not a size"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(text, told):
    with pytest.raises(ConfigError) as caught:
        parse_sizes(text)
    assert told in str(caught.value)


@pytest.mark.parametrize("topology", ASKED_FOR)
def test_a_topology_is_explained_size_by_size(topology):
    lines = _explain("all_reduce", "--topology", topology, "--sizes", "1KiB..256MiB").splitlines()
    world_size = named_topology(topology).world_size
    assert lines[0].strip() == f"all_reduce sum float32 on {topology}, {world_size} ranks"
    assert lines[1].split() == ["bytes", "algorithm", "us", "from", "reason"]
    assert len(lines) == 2 + 19
    for line in lines[2:]:
        assert re.match(
            r" *\d+ [KM]iB +(triton|torch):\w+ +(\d+\.\d) +model +"
            r"model, not a measurement: \2 us against [\d.]+ us of \w+:\w+ *$",
            line,
        ), line
    assert "torch:nccl" in lines[-1]


def test_b200s_and_h100s_choose_differently_by_size():
    first, second = (
        [d.algorithm for d in answers(Question("all_reduce", (64 << 10, 128 << 10), name), Config())]
        for name in ("h100x8", "b200x8")
    )
    assert first == ["triton:one_shot_push", "triton:multimem_two_shot"]
    assert second == ["triton:one_shot_ll", "triton:one_shot_push"]


def test_a_single_size_comes_with_all_that_was_rejected():
    output = _explain("all_reduce", "--topology", "h100x8-no-multicast", "--sizes", "1MiB")
    for algorithm in GPU_ALGORITHMS["all_reduce"]:
        assert output.count(algorithm.name) == 1
    assert re.search(r"triton:multimem_two_shot +no multicast: ranks 0 to 7: switched off", output)
    assert re.search(r"torch:nccl +model: 25.0 us against 11.6 us of triton:two_shot", output)


@pytest.mark.parametrize("topology", ASKED_FOR)
@pytest.mark.parametrize("options", [(), ("--deterministic",), ("--dtype", "bfloat16", "--redop", "max")])
def test_json_is_what_the_communicator_chooses_by(topology, options):
    output = _explain("all_reduce", "--topology", topology, "--sizes", "1KiB..256MiB", "--json", *options)
    decisions = decode_decisions(output.encode())
    comm = _communicator(
        named_topology(topology), Config(deterministic="--deterministic" in options), load_table()
    )
    dtype, op = (torch.bfloat16, "max") if "--redop" in options else (torch.float32, "sum")
    sizes = parse_sizes("1KiB..256MiB")
    assert decisions == [
        comm.explain("all_reduce", nbytes=nbytes, dtype=dtype, op=op, device="cuda") for nbytes in sizes
    ]


def test_json_without_a_topology_is_of_this_machine():
    decisions = decode_decisions(
        _explain("broadcast", "--sizes", "1KiB,1MiB", "--ranks", "4", "--json").encode()
    )
    assert [(d.request.nbytes, d.request.world_size, d.engine) for d in decisions] == [
        (1 << 10, 4, "cpu"), (1 << 20, 4, "cpu"),
    ]  # fmt: skip


def test_nbytes_is_the_older_name_of_sizes():
    assert _explain("all_reduce", "--nbytes", "1KiB") == _explain("all_reduce", "--sizes", "1KiB")


def test_an_algorithm_can_be_asked_for():
    output = _explain(
        "all_gather", "--topology", "h100x8", "--sizes", "1MiB", "--algorithm", "multimem", "--ranks", "8"
    )
    assert "'multimem' was asked for by name" in output


@pytest.mark.parametrize(
    ("args", "kind", "told"),
    [
        (("--topology", "h300x8"), ConfigError, "give one of h100x8, b200x8, h100x8-no-multicast, "),
        (
            ("--topology", "pcie2", "--ranks", "3"),
            ConfigError,
            "--ranks 3 contradicts --topology pcie2, which has 2 ranks; leave --ranks out",
        ),
        (("--dtype", "nonsense"), ConfigError, "'nonsense' is no dtype of torch"),
        (("--topology", "h100x8", "--algorithm", "multimem_two_shot", "--redop", "max"), CapabilityError,
         "max is not among sum"),
        (("--topology", "2xh100x8", "--algorithm", "two_shot"), CapabilityError, "the ranks are on 2"),
    ],
)  # fmt: skip
def test_a_question_without_an_answer_is_refused(args, kind, told):
    with pytest.raises(kind) as caught:
        _explain("all_reduce", "--sizes", "1MiB", *args)
    assert told in str(caught.value)


def _answer(ask):
    try:
        return ask()
    except CapabilityError as error:
        return str(error)


def _random_call(rng, world_size):
    """A call of a random verb with a tensor of random length, as the communicator gets it: its job."""
    verb = rng.choice(["all_reduce", "all_gather_single", "reduce_scatter_single", "broadcast",
                       "reduce", "gather", "scatter", "barrier"])  # fmt: skip
    dtype = rng.choice(
        [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8]
    )
    op = rng.choice(["sum", "sum", "max", "min", "product"])
    numel = world_size * int(2 ** rng.uniform(0, 24))
    args = {
        "all_reduce": (op,), "reduce": (0, op), "reduce_scatter_single": (op, 0), "all_gather_single": (0,),
        "broadcast": (0,), "gather": (0, 0), "scatter": (0, 0), "barrier": (),
    }[verb]  # fmt: skip
    caller = Caller(rng.randrange(world_size), world_size, torch.Size([numel]), dtype)
    return JOBS[verb](caller, *args), op, dtype


def _random_table(rng):
    names = ["triton:two_shot", "triton:multimem_two_shot", "triton:push", "torch:nccl", "cpu:two_shot"]
    rows = [
        Row(
            op=rng.choice(["all_reduce", "all_gather"]),
            algorithm=rng.choice(names),
            max_nbytes=rng.choice([None, 1 << 16]),
            measured_us={name: rng.uniform(1, 50) for name in names},
            device=rng.choice(["h100", "b200", ""]),
        )
        for _ in range(rng.randrange(4))
    ]
    return Table(1, "", "", "", "", tuple(rows))


FORMS = (
    "4xb200x2",
    "h100x3",
    "2xgb200x8-no-multicast",
    "2xa100x4",
    *(name for name in PRESETS if name != "h200"),
)
FORCED = (
    *("", "", "", "", "triton", "torch"),
    *("two_shot", "triton:multimem_two_shot", "push", "multimem", "hierarchical"),
)


def test_a_result_in_a_symmetric_tensor_is_another_question():
    command = ["explain", "all_reduce", "--sizes", "4MiB", "--ranks", "4"]
    plain, symmetric = (CliRunner().invoke(app, [*command, *more]) for more in ([], ["--symmetric"]))
    assert "cpu:two_shot_direct" not in plain.output
    assert symmetric.output.startswith(
        "all_reduce sum float32, 4194304 bytes on 4 ranks (cpu, into a symmetric tensor): cpu:two_shot_direct"
    )


def _three_answers(rng, monkeypatch):
    """To one random question: of the call itself, of the communicator's explain, and of the command line."""
    name, algorithm = rng.choice(FORMS), rng.choice(FORCED)
    topology, table = named_topology(name), _random_table(rng)
    config = Config(algorithm=rng.choice(FORCED), deterministic=rng.random() < 0.3)
    comm = _communicator(topology, config, table)
    job, op, dtype = _random_call(rng, topology.world_size)
    monkeypatch.setattr("tcomm.cli.explain.load_table", lambda _: table)
    comm._regions = Regions()
    # The variable is read again by the command line, with its own --deterministic beside it.
    question = Question(
        job.call.op, (job.nbytes,), name, rng.choice([0, topology.world_size]),
        str(dtype).removeprefix("torch."), op, algorithm, rng.random() < 0.5 and config.deterministic,
    )  # fmt: skip
    asked = {"nbytes": job.nbytes, "dtype": dtype, "op": op, "device": "cuda", "algorithm": algorithm}
    return (
        _answer(lambda: comm._decide(job, "cuda", algorithm)),
        _answer(lambda: comm.explain(job.call.op, **asked)),
        _answer(lambda: answers(question, config)[0]),
    )


def test_a_thousand_random_questions_are_answered_as_the_communicator_answers(monkeypatch):
    rng, seen = random.Random(20), set()
    for index in range(1000):
        called, told, printed = _three_answers(rng, monkeypatch)
        assert called == told == printed, index
        seen.add("refused" if isinstance(called, str) else called.algorithm)
    assert seen > {"refused", "torch:nccl", "triton:hierarchical", "triton:multimem", "triton:push"}
    assert len(seen) > 9


def test_every_verb_of_the_command_line_can_be_explained():
    for name, verb in VERBS.items():
        decision = answers(Question(name, (1 << 20,), "h100x8"), Config())[0]
        assert decision.request.op == verb
        assert FAMILIES[verb]

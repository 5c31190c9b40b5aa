"""Experts that some tokens like too much, copied to where there is room while the model runs.

    torchrun --nproc-per-node 4 examples/balanced_experts.py
    torchrun --nproc-per-node 4 examples/balanced_experts.py --asynchronous

Tokens are the hidden states that all-MiniLM-L6-v2 has for `sentences.txt`. They go through four layers of 64
experts with a router each; hidden states are alike, so a few experts get most of them. Each layer has 80
slots: 16 experts have a second one. `choose_slots` gives each token a slot of its expert and counts,
`make_backend` carries it there, and `EplbState` looks at the counts and moves weights from rank to rank.

The table has the load of the busiest rank over the mean, before and after, as it was counted. The outcome of
every pass is compared with the layers computed whole, without any communication: where experts are makes no
difference to it. The last line is `ok` when that is so and the ranks are busy more evenly than before.

Needs what `minilm_tensor_parallel.py` needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from minilm import CannotRunError, find_model
from moe_layer import GatedExperts, Tokens, read_tokens
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from tcomm import TcommError
from tcomm.eplb import EplbState, choose_slots
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.parallel.eplb_config import EPLBConfig
from tcomm.groups.parallel.parallel_config import ParallelConfig
from tcomm.moe import MoeShape, make_backend

TIMEOUT_SECONDS = 60.0
NUM_LAYERS, NUM_EXPERTS, NUM_REDUNDANT, TOP_K = 4, 64, 16, 4
NUM_SLOTS = NUM_EXPERTS + NUM_REDUNDANT
STEP_INTERVAL = 16
"""Steps from one rearrangement to the next; the first one comes after a quarter of them."""
MOST_STEPS, STEPS_AFTER = 400, 4
TOLERANCE = 1e-5


# The model ---------------------------------------------------------------------------------------


def routes(layer: int, x: Tensor) -> Tokens:
    """Tokens, and the experts that the router of a layer picks for them."""
    router = torch.randn(NUM_EXPERTS, x.shape[1], generator=torch.Generator().manual_seed(100 + layer))
    weights, idx = (x @ router.T).softmax(1).topk(TOP_K, dim=1)
    return Tokens(x, idx, weights / weights.sum(1, keepdim=True))


def after_layer(x: Tensor, y: Tensor) -> Tensor:
    """What the next layer gets."""
    return functional.layer_norm(x + y, x.shape[1:])


class Model:
    """Layers of routed experts, of whose slots each rank has its share. A `MixtureOfExperts`."""

    num_moe_layers, num_expert_groups, num_shared_experts = NUM_LAYERS, 1, 0
    num_logical_experts = num_routed_experts = NUM_EXPERTS
    num_physical_experts, num_redundant_experts = NUM_SLOTS, NUM_REDUNDANT

    def __init__(self, x: Tensor, longest: int) -> None:
        self.x = x
        self.rank, world_size = dist.get_rank(), dist.get_world_size()
        self.num_local_physical_experts = NUM_SLOTS // world_size
        self.expert_weights: list[list[Tensor]] = []
        whole = [GatedExperts.random(x.shape[1], seed) for seed in range(NUM_LAYERS)]
        # Picked once: the last bit of a sum must not decide between two experts.
        self.routed, self.expected = self._computed_whole(whole)
        first = EplbState.build_initial_global_physical_to_logical_map(NUM_EXPERTS, NUM_REDUNDANT)
        mine = first[self.rank * self.num_local_physical_experts :][: self.num_local_physical_experts]
        self.shares = [GatedExperts(*(w[mine] for w in layer.parameters())) for layer in whole]
        shape = MoeShape(NUM_SLOTS, TOP_K, x.shape[1], longest, torch.float32)
        self.backend = make_backend("high_throughput", shape, timeout=TIMEOUT_SECONDS)

    def set_eplb_state(self, load: Tensor, log2phy: Tensor, logcnt: Tensor) -> None:
        """Take what the state writes: where experts are; and give it what it moves."""
        self.load, self.log2phy, self.logcnt = load, log2phy, logcnt
        self.expert_weights = [share.parameters() for share in self.shares]

    def _computed_whole(self, whole: Sequence[GatedExperts]) -> tuple[list[Tokens], Tensor]:
        """What each layer gets, with its routes, and the outcome, without any communication."""
        x, routed = self.x, []
        for layer, experts in enumerate(whole):
            routed.append(routes(layer, x))
            x = after_layer(x, experts.flat(x, routed[-1].idx, routed[-1].weights))
        return routed, x

    def forward(self) -> Tensor:
        """The outcome for this rank's tokens. **Collective.**"""
        x = self.x
        for layer, share in enumerate(self.shares):
            routed = self.routed[layer]
            slots = choose_slots(
                routed.idx, self.log2phy[layer], self.logcnt[layer],
                expert_load=self.load[layer], salt=self.rank,
            )  # fmt: skip
            x = after_layer(x, self.backend.forward(x, slots, routed.weights, share))
        return x

    def difference(self) -> float:
        """How far a pass is from the layers computed whole. **Collective.**"""
        far = (self.forward() - self.expected).abs() / (1 + self.expected.abs())
        worst = far.amax().nan_to_num(torch.inf) if len(far) else torch.tensor(0.0)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return worst.item()


# Balancing ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Course:
    """What happened."""

    before: list[Tensor] = dataclasses.field(default_factory=list)
    """Load of each rank in each layer, [L, G], of passes before anything was moved."""
    after: list[Tensor] = dataclasses.field(default_factory=list)
    """The same, once all was."""
    worst: float = 0.0
    """Difference from the layers computed whole."""
    num_between: int = 0
    """Passes while weights were on their way."""


def counted(model: Model) -> Tensor:
    """Load of each rank in each layer in the last pass: [L, G]. **Collective.**"""
    load = model.load[:, :NUM_SLOTS].clone()
    dist.all_reduce(load)
    return load.view(NUM_LAYERS, dist.get_world_size(), -1).sum(2)


def run(model: Model, state: EplbState) -> Course:
    """Passes before, while and after experts are moved. **Collective.**"""
    course = Course()
    balanced = next(iter(state.model_states.values()))
    for _ in range(MOST_STEPS):
        course.worst = max(course.worst, model.difference())
        loads = counted(model)
        if balanced.last_rearrangement is not None:
            course.after.append(loads)
        elif state.rearrange_event.is_set():
            course.num_between += 1
        else:
            course.before.append(loads)
        if len(course.after) == STEPS_AFTER:
            break
        state.step()
    return course


def busiest(loads: Sequence[Tensor]) -> list[float]:
    """Load of the busiest rank over the mean, for each layer."""
    total = torch.stack(list(loads)).sum(0).double()
    return (total.amax(1) / total.mean(1)).tolist()


def demonstrate(tokens: Tokens, asynchronous: bool) -> bool:
    """Whether the ranks are busy more evenly, and nothing else has changed. **Collective.**"""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = Model(tokens.split(rank, world_size).x, len(tokens.split(0, world_size).x))
    eplb = EPLBConfig(
        window_size=STEP_INTERVAL // 4, step_interval=STEP_INTERVAL, num_redundant_experts=NUM_REDUNDANT,
        use_async=asynchronous,
    )  # fmt: skip
    config = ParallelConfig(
        tensor_parallel_size=world_size, enable_expert_parallel=True, enable_eplb=True, eplb_config=eplb,
        distributed_executor_backend="mp",
    )  # fmt: skip
    group = GroupCoordinator.from_process_group(dist.group.WORLD, group_name="ep", timeout=TIMEOUT_SECONDS)
    state = EplbState(config, torch.device("cpu"), ep_group=group)
    try:
        state.add_model(model, config)
        course = run(model, state)
        report = str(next(iter(state.model_states.values())).last_rearrangement)
    finally:
        state.close()
        model.backend.close()
        group.destroy()
    problems = problems_of(course)
    if rank == 0:
        show(course, report)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        if not problems:
            print("ok", flush=True)
    return not problems


def problems_of(course: Course) -> list[str]:
    """What is not as it should be."""
    problems = []
    if not course.worst <= TOLERANCE:
        problems.append(f"{course.worst:.1e} from the whole layers; at most {TOLERANCE:g} was wanted")
    if not course.after:
        problems.append(f"no experts were moved in {MOST_STEPS} steps")
    elif not sum(busiest(course.after)) < sum(busiest(course.before)):
        problems.append("the busiest ranks are as busy as before")
    return problems


def show(course: Course, report: str) -> None:
    """Print what happened; in plain ASCII where the output is no terminal."""
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 110, markup=False, highlight=False, emoji=False)
    ranks = dist.get_world_size()
    console.print(f"top {TOP_K} of {NUM_EXPERTS} experts in {NUM_SLOTS} slots on {ranks} ranks")
    table = Table(box=box.SIMPLE if terminal else box.ASCII)
    for column in ("layer", "busiest rank before", "after"):
        table.add_column(column)
    rows = zip(busiest(course.before), busiest(course.after) if course.after else [], strict=False)
    for layer, (before, after) in enumerate(rows):
        table.add_row(str(layer), f"{before:.2f}", f"{after:.2f}")
    console.print(table)
    console.print(report)
    passes = len(course.before) + course.num_between + len(course.after)
    console.print(
        f"{passes} passes, {course.num_between} of them while weights were on their way; largest difference "
        f"{course.worst:.1e}"
    )
    sys.stdout.flush()


# Start and end -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0 agreed, 1 wrong or failed, 2 something is not installed."""
    parser = argparse.ArgumentParser(description="Routed experts, moved to where there is room for them.")
    parser.add_argument("--asynchronous", action="store_true", help="move them beside the passes")
    options = parser.parse_args(arguments)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        directory = find_model()
        if NUM_SLOTS % world_size or world_size < 2:
            wanted = "start it with torchrun --nproc-per-node 4, or any divisor of 80 from 2 on"
            raise CannotRunError(f"a world of {world_size} cannot share {NUM_SLOTS} slots; {wanted}", 1)
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        try:
            return 0 if demonstrate(read_tokens(directory), options.asynchronous) else 1
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

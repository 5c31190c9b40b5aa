"""A small model with experts, whose result does not depend on where they are; and what moves its weights."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn

from tcomm.eplb.routing import choose_slots
from tcomm.eplb.state.state import EplbState
from tcomm.errors import PeerLostError
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.parallel.eplb_config import EPLBConfig
from tcomm.groups.parallel.parallel_config import ParallelConfig
from tests.groups.parallel.engine import coordinator

HIDDEN, TOP_K = 4, 2


def expert_weights(layer, expert):
    """Of one expert: two parameters, of different dtypes."""
    generator = torch.Generator().manual_seed(1000 * layer + expert)
    matrix = torch.randn(HIDDEN, HIDDEN, generator=generator)
    return matrix, torch.tensor([100 * layer + expert], dtype=torch.int16)


class Toy(nn.Module):
    """L layers of E experts with redundant slots, evenly on G ranks. At first no slot has weights."""

    def __init__(self, group=None, layers=2, experts=4, redundant=2, groups=1, num_ranks=None, rank=0):
        super().__init__()
        self.group = group
        self.rank = rank if group is None else group.rank_in_group
        num_ranks = num_ranks or (1 if group is None else group.world_size)
        self.num_moe_layers, self.num_expert_groups, self.num_shared_experts = layers, groups, 0
        self.num_logical_experts = self.num_routed_experts = experts
        self.update_physical_experts_metadata(experts + redundant, (experts + redundant) // num_ranks)
        self.expert_weights = []
        local = self.num_local_physical_experts
        self.matrices = nn.Parameter(torch.full((layers, local, HIDDEN, HIDDEN), torch.nan))
        self.register_buffer("tags", torch.full((layers, local, 1), -1, dtype=torch.int16))

    def update_physical_experts_metadata(self, num_physical_experts, num_local_physical_experts):
        self.num_physical_experts = num_physical_experts
        self.num_local_physical_experts = num_local_physical_experts
        self.num_redundant_experts = num_physical_experts - self.num_logical_experts

    def set_eplb_state(self, expert_load_view, logical_to_physical_map, logical_replica_count):
        self.load, self.log2phy, self.logcnt = (
            expert_load_view,
            logical_to_physical_map,
            logical_replica_count,
        )
        self.expert_weights = [list(pair) for pair in zip(self.matrices, self.tags, strict=True)]

    def fill(self, phy2log):
        """Put the weights into the slots of this rank that a map [L, P] gives them."""
        first = self.rank * self.num_local_physical_experts
        with torch.no_grad():
            for layer, row in enumerate(phy2log.tolist()):
                for slot, expert in enumerate(row[first : first + self.num_local_physical_experts]):
                    if expert >= 0:
                        matrix, tag = expert_weights(layer, expert)
                        self.matrices[layer, slot].copy_(matrix)
                        self.tags[layer, slot].copy_(tag)
        return self

    def holds(self):
        """The expert in each slot of this rank, by its weights: [L, P / G]."""
        return [
            [int(tag) - 100 * layer if tag >= 0 else -1 for tag in tags.view(-1)]
            for layer, tags in enumerate(self.tags)
        ]

    @torch.no_grad()
    def forward(self, tokens, choices):
        """Every layer's experts of `choices` [T, L, k] on `tokens` [T, H], computed where they are."""
        for layer in range(self.num_moe_layers):
            slots = self._slots(layer, choices[:, layer].contiguous())
            tokens = tokens + self._computed(layer, tokens, slots).sum(dim=1)
        return tokens

    def _slots(self, layer, chosen):
        """[T, k]: where choices go. They are counted here when all slots are."""
        counts_all = self.load.shape[1] > self.num_local_physical_experts or self.group.world_size == 1
        load = self.load[layer] if counts_all else None
        maps = self.log2phy[layer], self.logcnt[layer]
        slots = choose_slots(chosen, *maps, expert_load=load, salt=self.rank)
        for slot in [] if counts_all else self._gathered(slots).view(-1).tolist():
            if slot // self.num_local_physical_experts == self.rank:
                self.load[layer, slot % self.num_local_physical_experts] += 1
        return slots

    def _computed(self, layer, tokens, slots):
        """[T, k, H]: each by the rank that has the slot."""
        size = self.num_local_physical_experts
        everything, asked = (self._gathered(x) for x in (tokens, slots))
        results = torch.zeros(*asked.shape, HIDDEN)
        for token, row in enumerate(asked.tolist()):
            for choice, slot in enumerate(row):
                if slot // size == self.rank:
                    results[token, choice] = everything[token] @ self.matrices[layer, slot % size]
        results = self.group.all_reduce(results)
        return results[self.rank * len(tokens) : (self.rank + 1) * len(tokens)]

    def _gathered(self, x):
        return self.group.all_gather(x, 0)


class GatheringMover:
    """Moves a layer by gathering all of it; for the tests of a state."""

    def __init__(self, group, fails_at=None):
        self.group, self.fails_at, self.calls, self.rows = group, fails_at, [], None

    def prepare(self, layer, moves, weights):
        if layer == self.fails_at:
            raise PeerLostError("rank 1 is gone", peers=[1])
        self.calls.append(("prepare", layer))
        self.rows = [self.group.all_gather(weight.contiguous(), 0) for weight in weights]

    def settle(self, is_agreed):
        return is_agreed

    def commit(self, layer, moves, weights):
        self.calls.append(("commit", layer))
        first = self.group.rank_in_group * len(weights[0])
        sources = {copy.target: copy.source for round_ in moves.rounds for copy in round_}
        sources |= {copy.target: copy.source for copy in moves.local}
        sources |= {copy.target: sources[copy.source] for copy in moves.duplicates}
        for target, source in sources.items():
            if first <= target < first + len(weights[0]):
                for weight, rows in zip(weights, self.rows, strict=True):
                    weight[target - first].copy_(rows[source])

    def reserve(self, weights):
        self.calls.append(("reserve", len(weights)))

    def close(self):
        self.calls.append(("close", -1))


class ToyState(EplbState):
    """With that mover."""

    fails_at = None

    def make_mover(self, group, weights):
        return GatheringMover(group, self.fails_at)


def config(**given):
    """A `ParallelConfig` whose `eplb_config` has what is given."""
    elastic = {name: given.pop(name) for name in list(given) if "elastic" in name}
    return ParallelConfig(
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        enable_eplb=True,
        distributed_executor_backend="mp",
        eplb_config=EPLBConfig(**{"window_size": 4, "step_interval": 4, **given}),
        **elastic,
    )


class ModelConfig:
    """What a model is known by."""

    def __init__(self, model="toy"):
        self.model = model

    def compute_hash(self):
        return f"hash of {self.model}"


@contextlib.contextmanager
def lone_group():
    """An expert parallel group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = GroupCoordinator([[0]], 0, "gloo", True, group_name="ep")
    try:
        yield group
    finally:
        group.destroy()
        dist.destroy_process_group()


@contextlib.contextmanager
def expert_group(member, rows=None):
    """Of all ranks of a test."""
    with coordinator(member, name="ep", rows=rows) as group:
        yield group


def skewed_choices(tokens, layers, experts, rank):
    """[T, L, k]: expert 0 of even layers and the last of odd ones are chosen most."""
    generator = torch.Generator().manual_seed(rank)
    choices = torch.randint(1, experts, (tokens, layers, TOP_K), generator=generator)
    choices[:, :, 0] = 0
    choices[:, 1::2] = experts - 1 - choices[:, 1::2]
    return choices

"""Slots of experts, compiled: the slots and counts of the host, and graphs."""

import pytest
import torch

from tcomm.cpu.expert_slots import choose_slots as choose_on_host
from tcomm.cpu.expert_slots import count_slots
from tcomm.eplb import choose_slots
from tcomm.memory.expert_slots import SlotCounter
from tests.kernels import slot_choices

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(240)]


def test_the_example_and_the_edges():
    slot_choices.check_example("cuda")
    slot_choices.check_out_of_range("cuda")
    slot_choices.check_thresholds("cuda")


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 33, 1000, 8192])
@pytest.mark.parametrize("num_experts", [1, 16, 256, 384])
def test_kernels_have_the_slots_and_counts_of_the_host(num_tokens, num_experts):
    for seed in range(8):
        slot_choices.check_kernel(seed, num_tokens, seed + 1, num_experts, "cuda", times=4)
    kinds = {"dtype": torch.int32, "load_dtype": torch.int64}
    slot_choices.check_kernel(1, num_tokens, 8, num_experts, "cuda", **kinds)


class Layers:
    """Layers of a model, whose rows of the counter begin at any multiple of 4 bytes, and their calls."""

    def __init__(self, num_layers, num_tokens, topk, num_experts, shares):
        make = slot_choices.random_routing
        self.layers = [make(seed, num_tokens, topk, num_experts, shares=shares) for seed in range(num_layers)]
        self.there = [layer.to("cuda") for layer in self.layers]
        self.out = [torch.empty_like(layer.topk) for layer in self.there]
        self.load = torch.zeros(num_layers, 9, dtype=torch.int32, device="cuda")
        self.wanted = torch.zeros(num_layers, 9, dtype=torch.int32)
        self.unpadded = torch.tensor([num_tokens], device="cuda")
        self.record = torch.tensor(True, device="cuda")

    def run(self, layers=None):
        for layer, out, load in list(zip(self.there, self.out, self.load, strict=True))[:layers]:
            choose_slots(
                layer.topk, layer.slots, layer.count, share=layer.share, expert_load=load, first_slot=9,
                salt=2, num_unpadded_tokens=self.unpadded, should_record=self.record, out=out,
            )  # fmt: skip

    def put(self, seed, record, unpadded):
        """New tokens, and which of them count."""
        made = torch.Generator().manual_seed(seed)
        for layer, there in zip(self.layers, self.there, strict=True):
            layer.topk.random_(-1, len(layer.count), generator=made)
            there.topk.copy_(layer.topk)
        self.unpadded.fill_(unpadded)
        self.record.fill_(record)

    def check(self, record, unpadded):
        for layer, out, load in zip(self.layers, self.out, self.wanted, strict=True):
            wanted = torch.empty_like(layer.topk)
            choose_on_host(layer.topk, layer.slots, layer.count, layer.share, 2, wanted)
            count_slots(wanted, SlotCounter(load, 9, unpadded, torch.tensor(record)))
            assert torch.equal(out.cpu(), wanted)
        assert torch.equal(self.load.cpu(), self.wanted)


@pytest.mark.parametrize("shares", [False, True])
def test_all_layers_in_a_graph_with_new_tokens(shares):
    layers = Layers(5, 300, 8, 64, shares)
    # One layer, once: what is compiled for it serves all, or the capture would fail.
    layers.run(1)
    layers.load.zero_()
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph):
        layers.run()
        assert torch.cuda.memory_allocated() == before
    for seed in range(30):
        record, unpadded = seed % 3 != 2, (300, 111, 0)[seed % 3]
        layers.put(seed, record, unpadded)
        graph.replay()
        layers.check(record, unpadded)


def test_nothing_waits_for_the_device():
    layers = Layers(2, 64, 4, 32, False)
    layers.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layers.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")

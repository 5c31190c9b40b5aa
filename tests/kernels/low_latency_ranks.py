"""Low-latency kernels on virtual ranks, without a communicator: what a call needs, for all of them."""

import torch

from tcomm.kernels.moe_low_latency import receive_copies, send_copies
from tcomm.memory.layout import StagingLayout
from tcomm.memory.moe_slots import RowFormat, SlotLayout
from tcomm.memory.virtual import VirtualArena
from tcomm.signature import CallDescription
from tests.groups.moe.low_latency_cases import Case, tokens_of

CALL = CallDescription("low_latency", "bfloat16")


class VirtualExchange:
    """Tensors have a row for each rank; all ranks have M tokens, some of which choose nothing."""

    def __init__(self, world_size, experts=2, tokens=2, topk=3, hidden=128, scaling=(False, False, False)):
        self.layout = SlotLayout(world_size, experts, tokens, topk, hidden, 2)
        self.form = RowFormat(hidden, torch.bfloat16, *scaling)
        nbytes = StagingLayout.for_half(self.layout.half_nbytes, world_size)
        self.arena = VirtualArena(world_size, torch.device("cpu"), nbytes)
        self.case = Case(3, topk, "full")
        given = [tokens_of(self.case, self.layout, rank) for rank in range(world_size)]
        self.x, self.idx, self.weights = (torch.stack(one) for one in zip(*given, strict=True))
        self.idx[0, 0, 0] = -1
        self.idx[1, :, 1] = self.idx[1, :, 0]
        self.idx[2, 1, 2] = world_size * experts  # of no meaning: counts as none
        self.slots = torch.full(self.idx.shape, 99, dtype=torch.int32)
        self.counts = torch.zeros(world_size, world_size * experts, dtype=torch.int32)
        shape = (world_size, experts, self.layout.capacity)
        self.rows = torch.zeros(*shape, self.form.row_nbytes // 4, dtype=torch.int32)
        self.scales = torch.zeros(world_size, experts, self.form.num_scale_words, shape[2], dtype=torch.int32)
        self.src_info = torch.full(shape, -1, dtype=torch.int32)
        self.ranges = torch.zeros(world_size, experts, world_size, dtype=torch.int64)
        self.received = torch.zeros(world_size, experts, dtype=torch.int32)
        self.stats = torch.ones(world_size, experts, dtype=torch.int32)

    def dispatch(self):
        epoch = send_copies(
            self.arena, CALL, 20.0, self.layout, self.form, self.x, self.idx, self.slots, self.counts
        )
        receive_copies(
            self.arena, CALL, 20.0, epoch, self.layout, self.form, self.rows, self.scales, self.src_info,
            self.ranges, self.received, self.stats, None,
        )  # fmt: skip

    def wanted(self, rank, expert):
        """(source, token) of the rows of a local expert, in order."""
        number = rank * self.layout.num_local_experts + expert
        chosen = (self.idx == number).any(2)
        return [(int(source), int(token)) for source, token in chosen.nonzero()]

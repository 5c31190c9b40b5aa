import pytest
import torch

from tcomm.kernels.moe_low_latency_combine import send_rows, sum_rows
from tcomm.memory.base import Staging, SymmetricBuffer
from tcomm.memory.layout import StagingLayout
from tests.kernels.low_latency_ranks import CALL, VirtualExchange


def lent_memory(layout):
    """Two halves on each rank, and the second one of each as [El, R * M, H]."""
    staging = StagingLayout(
        StagingLayout.for_half(layout.combine_nbytes, layout.world_size), layout.world_size
    )
    memory = [torch.zeros(staging.nbytes, dtype=torch.uint8) for _ in range(layout.world_size)]
    buffer = SymmetricBuffer(0, memory)
    shape = (layout.num_local_experts, layout.capacity, layout.hidden)
    views = [buffer.peer(rank, shape, torch.bfloat16, staging.half(1)) for rank in range(layout.world_size)]
    return Staging(buffer, staging), views


@pytest.mark.parametrize(("world", "lends"), [(8, False), (3, True)])
def test_virtual_ranks_combine(world, lends):
    ranks = VirtualExchange(world)
    ranks.dispatch()
    layout, lent = ranks.layout, None
    scale = (torch.arange(world * 2).view(world, 2, 1, 1) % 3 + 1).float()
    y = (ranks.rows.view(torch.bfloat16).float() * scale).to(torch.bfloat16)
    y[ranks.src_info < 0] = float("nan")
    if lends:
        lent, views = lent_memory(layout)
        for view, rows in zip(views, y, strict=True):
            view.copy_(rows)
    epoch = send_rows(ranks.arena, CALL, 20.0, layout, y, ranks.ranges, 1, lends)
    out = torch.full_like(ranks.x, 7)
    leaving_out = ranks.idx.clone()
    leaving_out[world - 1, 0] = -1
    sum_rows(
        ranks.arena,
        CALL,
        20.0,
        epoch,
        layout,
        out,
        leaving_out,
        ranks.weights,
        ranks.slots,
        ranks.counts,
        lent,
    )
    wanted = torch.zeros(out.shape)
    for j in range(leaving_out.shape[2]):
        experts = leaving_out[:, :, j]
        is_there = (experts >= 0) & (experts < world * 2)
        term = (ranks.x.float() * (experts % 3 + 1).unsqueeze(2)).to(torch.bfloat16).float()
        wanted += torch.where(is_there.unsqueeze(2), ranks.weights[:, :, j].unsqueeze(2) * term, 0.0)
    assert torch.equal(out, wanted.to(torch.bfloat16))
    assert not out[world - 1, 0].any()

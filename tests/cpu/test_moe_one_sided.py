import torch

from tcomm.cpu import moe_one_sided
from tcomm.groups.moe.routes import make_routes
from tcomm.signature import CallDescription

CALL = CallDescription("turn", "rows")


def _turns(member):
    arena, rank = member.arena(64 << 10), member.rank
    ids = torch.tensor([[0, -1], [1, 0]]) if rank else torch.tensor([[1, -1]])
    routes = make_routes(ids, 2, 2).tables
    x = torch.arange(len(ids))[:, None] + 10 * (rank + 1)
    y = x.to(torch.int32).repeat(1, 3)
    received = moe_one_sided.dispatch([x, y], [128, 256], routes, 2, arena, CALL, 20.0)
    base, buffer = arena.staging.layout.half(0), arena.staging.buffer
    got = (
        buffer.peer(rank, (2, 2), torch.int64, base + 128),
        buffer.peer(rank, (2, 2, 3), torch.int32, base + 256),
    )
    out, again = torch.empty(len(ids), 1), torch.empty(len(ids), 1)
    moe_one_sided.combine(got[0][..., None] / 4, out, 1024, routes, received, 2, arena, CALL, 20.0)
    # What lies in staging is not copied.
    buffer.peer(rank, (2, 2), torch.float32, base + 2048).copy_(got[0])
    moe_one_sided.combine(None, again, 2048, routes, received, 2, arena, CALL, 20.0)
    blocks = [[one[s, :n].flatten().tolist() for s, n in enumerate(received.tolist())] for one in got]
    member.meet("done")
    return blocks, out.flatten().tolist(), again.flatten().tolist()


def test_rows_go_to_their_block_and_come_back_as_sums(on_ranks):
    first, second = on_ranks(2, _turns)
    assert first[0] == [[[], [20, 21]], [[], [20] * 3 + [21] * 3]]
    assert second[0] == [[[10], [21]], [[10] * 3, [21] * 3]]
    assert first[1:] == ([2.5], [10.0])
    assert second[1:] == ([5.0, 10.5], [20.0, 42.0])

import time
import types

import pytest
import torch
import torch.distributed as dist

from tcomm.eplb.moving import torch_communicators
from tcomm.eplb.moving.torch_communicators import TorchGlooCommunicator, TorchNcclCommunicator
from tcomm.errors import ConfigError, PeerTimeoutError
from tests.groups.all2all.worlds import told


def _exchange(member):
    """Two experts each way; a scalar row, an empty one and one of a packed dtype; then a timeout."""
    member.process_group()
    gloo = TorchGlooCommunicator(dist.group.WORLD, 20.0)
    peer = 1 - member.rank
    gloo.execute()
    for expert in (5, 6):
        rows = [
            torch.full((3, 4), 10.0 * expert + member.rank),
            torch.tensor(expert + member.rank),
            torch.empty(0),
            torch.full((3,), expert, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        ]
        gloo.add_send(rows, peer, expert)
    came = [
        [torch.zeros(3, 4), torch.tensor(0), torch.empty(0), torch.zeros(3, dtype=torch.uint8)] for _ in "ab"
    ]
    for expert, rows in zip((5, 6), came, strict=True):
        gloo.add_recv(rows, peer, expert)
    gloo.set_stream(None)
    gloo.execute()
    # What was noted is forgotten.
    gloo.execute()
    refused = [
        told(gloo.add_send, [torch.zeros(2)], member.rank, 5)[1],
        told(gloo.add_recv, [torch.zeros(2)], 2, 6)[1],
        told(gloo.add_send, [torch.zeros(2, 2).t()], peer, 6)[1],
    ]
    gloo._seconds = 0.3
    began, late = time.monotonic(), ([], "")
    if member.rank == 0:
        gloo.add_recv([torch.zeros(2)], 1, 7)
        try:
            gloo.execute()
        except PeerTimeoutError as error:
            late = error.peers, str(error)
    took = time.monotonic() - began
    member.meet("late")
    return [[row.tolist() for row in rows] for rows in came], refused, late, took


def test_rows_come_in_order_and_a_late_peer_is_named(on_ranks):
    results = on_ranks(2, _exchange)
    for rank, (came, refused, _, _) in enumerate(results):
        peer = 1 - rank
        assert came == [[[[10.0 * e + peer] * 4] * 3, e + peer, [], [e] * 3] for e in (5, 6)]
        assert f"dst_rank={rank} of add_send of expert 5 is this rank itself" in refused[0]
        assert "src_rank=2 of add_recv of expert 6 is not a rank" in refused[1]
        assert "a row of [2, 2] is not contiguous" in refused[2]
    (_, _, (peers, text), took), _ = results
    assert peers == (1,)
    assert "receiving from rank 1 failed" in text
    assert 0.2 < took < 5


class Group(dist.ProcessGroup):
    """Rank 0 of two, for kernels that nobody starts."""

    def __init__(self):
        super().__init__(0, 2)


def test_nccl_gets_one_batch_and_has_until_the_deadline(monkeypatch):
    batches, waits, group = [], [], Group()
    answers = iter([False, False, True])
    work = types.SimpleNamespace(wait=lambda: waits.append(1))
    event = types.SimpleNamespace(query=lambda: next(answers, False))
    stream = types.SimpleNamespace(record_event=lambda: event)
    monkeypatch.setattr(torch_communicators.dist, "P2POp", lambda *args, **kwargs: (args, kwargs))
    monkeypatch.setattr(
        torch_communicators.dist, "batch_isend_irecv", lambda ops: batches.append(ops) or [work, work]
    )
    monkeypatch.setattr(torch_communicators.torch.cuda, "current_stream", lambda device: stream)
    nccl = TorchNcclCommunicator(group, 0.2)
    row, place = torch.zeros(2), torch.zeros(2)
    nccl.add_send([row], 1, 3)
    nccl.add_recv([place], 1, 4)
    nccl.execute()
    ((send, sent_to), (recv, received_from)), *_ = batches
    assert (send[0], recv[0]) == (dist.isend, dist.irecv)
    assert (send[1].data_ptr(), recv[1].data_ptr()) == (row.data_ptr(), place.data_ptr())
    assert sent_to == received_from == {"group": group, "group_peer": 1}
    assert waits == [1, 1]
    nccl.add_send([row], 1, 3)
    with pytest.raises(PeerTimeoutError, match=r"no answer of one of ranks \[1\]") as caught:
        nccl.execute()
    assert caught.value.peers == (1,)
    with pytest.raises(ConfigError, match="this rank itself"):
        nccl.add_recv([row], 0, 3)

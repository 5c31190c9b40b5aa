import pytest
import torch
from torch.distributed import HashStore

from tcomm.groups.moe.elastic import ElasticBuffer
from tests.groups.all2all.worlds import told

H, M, EACH, MOST, K = 16, 4, 2, 4, 3
NBYTES = ElasticBuffer.get_rdma_size_hint(M, H, MOST, MOST * EACH)


def _inputs(rank, ranks):
    """Choices of experts that there are among so many ranks."""
    generator = torch.Generator().manual_seed(10 * ranks + rank)
    x = torch.randn(M - rank, H, generator=generator).to(torch.bfloat16)
    idx = torch.rand(M - rank, EACH * ranks, generator=generator).argsort(1)[:, :K]
    return x, idx, torch.rand(M - rank, K, generator=generator)[:, : idx.shape[1]]


def _step(buffer, rank, ranks, **options):
    """How far a layer is from the dense one, where expert e multiplies by e + 1; and where results lie."""
    x, idx, weights = _inputs(rank, ranks)
    rows, counts, handle, event, hook = buffer.dispatch(x, idx, M, use_fp8=False, **options)
    if hook is not None:
        hook()
        hook()
    event.current_stream_wait()
    factors = torch.arange(1, EACH + 1) + EACH * rank
    y = (rows.float().nan_to_num(0, 0, 0) * factors[:, None, None]).to(torch.bfloat16)
    out = torch.empty_like(x)
    combined, _, hook = buffer.combine(y, idx, weights, handle, out, **options)
    if hook is not None:
        hook()
    there = buffer._own(idx) >= 0 if buffer._is_masked else idx >= 0
    dense = x.float() * ((idx + 1) * weights * there).sum(1)[:, None]
    wrong = (combined.float() - dense).abs().max().item()
    src_info, ranges, max_tokens, hidden = handle
    shapes = (tuple(rows.shape), tuple(src_info.shape), tuple(ranges.shape), max_tokens, hidden)
    return wrong, shapes, (rows.data_ptr(), counts.data_ptr()), int(counts.sum()), combined is out


def _come_and_go(member):
    buffer = ElasticBuffer(member.store, member.rank, timeout=20)
    sizes = {"max_tokens": M, "hidden": H} if member.rank == 0 else {}
    buffer.update_memory_buffers(MOST, EACH, NBYTES, **sizes)
    rank, found, masks, nobody = member.rank, [], [], ([], "ranks [2, 3] of 4 did not come")
    if rank < 2:
        buffer.connect_ranks([0, 1])
        found += [_step(buffer, rank, 2), _step(buffer, rank, 2, return_recv_hook=True)]
        masks.append(_mask(buffer))
        buffer._members._seconds = 0.3
        found.append(_step(buffer, rank, 2))
        nobody = told(buffer.connect_ranks, [2, 3])
        buffer._members._seconds = 20.0
        member.meet("nobody came")
        found.append(_step(buffer, rank, 2))
        # Those that come are met while the exchange goes on.
        buffer.stage(3)
        found.append(_step(buffer, rank, 2))
        buffer.commit()
        buffer.commit()
    else:
        member.meet("nobody came")
        buffer.connect_ranks(range(3))
    found += [_step(buffer, rank, 3) for _ in range(2)]
    masks.append(_mask(buffer))
    with buffer.mask_remote_ranks():
        found.append(_step(buffer, rank, 3))
        masks.append(_mask(buffer))
    x, idx, weights = _inputs(rank, 3)
    rows, _, old, _, _ = buffer.dispatch(x, idx, M, use_fp8=False)
    buffer.disconnect_ranks([2])
    gone = told(buffer.combine, rows, idx, weights, old)
    found += [_step(buffer, rank, 2)] if rank < 2 else []
    masks.append(_mask(buffer))
    refused = [
        told(buffer.dispatch, x[:, :8].contiguous(), idx, M),
        told(buffer.connect_ranks, [5]),
        told(buffer.disconnect_ranks, [0]),
        told(buffer.update_memory_buffers, MOST, EACH, 0),
        told(buffer.stage, MOST + 1),
    ]
    buffer.destroy()
    buffer.destroy()
    return found, masks, gone, [*refused, nobody], buffer.num_ranks


def _mask(buffer):
    mask = torch.full((MOST,), 7, dtype=torch.int32)
    buffer.query_mask_buffer(mask)
    return mask.tolist()


def test_ranks_come_and_go_and_addresses_stay(on_ranks):
    shapes = ((EACH, MOST * M, H), (EACH, MOST * M), (EACH, MOST), M, H)
    for rank, (found, masks, gone, refused, num_ranks) in enumerate(on_ranks(3, _come_and_go)):
        assert max(step[0] for step in found) < 0.1
        assert {step[1] for step in found} == {shapes}
        assert len({step[2] for step in found}) <= 2
        assert all(step[4] for step in found)
        assert masks[-3:-1] == [[0, 0, 0, 1], [int(r != rank) for r in range(MOST)]]
        assert masks[-1] == ([0, 0, 1, 1] if rank < 2 else [1] * 4)
        assert "group of ranks that is gone" in gone[1]
        texts = [text for _, text in refused]
        assert ("hidden=8" in texts[0]) == (rank < 2)
        assert ("no ranks are connected" in texts[0]) == (rank == 2)
        assert "ranks [5] do not follow" in texts[1]
        assert "ranks [0] are not the last" in texts[2]
        assert "a buffer of 0 bytes for 4 ranks with 2 experts each" in texts[3]
        assert "5 ranks where there is room for 4" in texts[4]
        assert "ranks [2, 3] of 4 did not come" in texts[5]
        assert num_ranks == 0


def _results_inside_and_outside(member):
    """Two results, one of all ranks and one of this rank alone, lie apart; a late hook spoils nothing."""
    buffer = ElasticBuffer(member.store, member.rank, timeout=20, on_timeout="mask")
    buffer.update_memory_buffers(3, EACH, NBYTES)
    told_early = [told(buffer.update_mask_buffer, 1, True)[1], buffer.masks, buffer.clean_mask_buffer()]
    buffer.connect_ranks([0, 1])
    x, idx, weights = _inputs(member.rank, 2)
    first, _, handle, _, _ = buffer.dispatch(x, idx, M, use_fp8=False)
    before = first.clone()
    with buffer.mask_remote_ranks(), buffer.mask_remote_ranks():
        second, _, alone, _, _ = buffer.dispatch(x, idx, M, use_fp8=False)
        third = told(buffer.dispatch, x, idx, M)[1]
    with buffer.mask_remote_ranks():
        with buffer.mask_remote_ranks():
            pass
        buffer.combine(second, idx, weights, alone)
        mask = _mask(buffer)
    kept = torch.equal(first.view(torch.uint8), before.view(torch.uint8))
    found = [
        kept,
        first.data_ptr() != second.data_ptr(),
        "inside and outside" in third,
        mask[1 - member.rank],
    ]
    # The hook of a result that is combined already, when the next one has its memory.
    buffer.combine(first, idx, weights, handle)
    *_, handle, _, late = buffer.dispatch(x, idx, M, use_fp8=False, return_recv_hook=True)
    buffer.combine(torch.zeros(EACH, 3 * M, H, dtype=torch.bfloat16), idx, weights, handle)
    rows, _, handle, _, _ = buffer.dispatch(-x, idx, M, use_fp8=False)
    rows.fill_(7)
    late()
    found.append(bool((rows == 7).all()))
    pending = buffer.combine(rows, idx, weights, handle, return_recv_hook=True)[-1]
    buffer.dispatch(x, idx, M, use_fp8=False)
    pending()
    found.append(_step(buffer, member.rank, 2)[0] < 0.1)
    # Whom the others mask by hand; then all come back.
    if member.rank == 0:
        buffer.update_mask_buffer(1, True)
        found += [_step(buffer, 0, 1)[0] < 0.1, buffer.masks.on_timeout == "mask"]
        few = torch.full((1,), 7, dtype=torch.int32)
        buffer.query_mask_buffer(few)
        found += [_mask(buffer) == [0, 1, 1, 1], few.tolist() == [0]]
    buffer.clean_mask_buffer()
    found += [_mask(buffer) == [0, 0, 1, 1], _step(buffer, member.rank, 2)[0] < 0.1]
    buffer.destroy()
    return told_early, found


def test_results_of_masked_calls_lie_apart(on_ranks):
    for early, found in on_ranks(2, _results_inside_and_outside):
        assert "call dispatch() first" in early[0]
        assert early[1:] == [None, None]
        assert found == [True] * len(found)
        assert len(found) in {8, 12}


def _with_scales(member):
    """What is received in fp8 has its scales beside it."""
    buffer = ElasticBuffer(HashStore(), member.rank, timeout=20)
    hidden = 128
    buffer.update_memory_buffers(3, 1, ElasticBuffer.get_rdma_size_hint(M, hidden, 3, 3))
    assert buffer.num_ranks == 0
    buffer._members._seconds = 5.0
    buffer.set_store(member.store)
    buffer.connect_ranks([0, 1])
    x = (torch.arange(2 * hidden).reshape(2, hidden) / 32 + member.rank).to(torch.bfloat16)
    idx = torch.tensor([[0], [1]])
    stats = torch.zeros(1, dtype=torch.int32)
    (rows, scales), counts, _, _, _ = buffer.dispatch(x, idx, M, 0, stats)
    back = rows[0, :2].float() * scales[0, :2]
    sent = torch.stack([(torch.arange(256).reshape(2, hidden) / 32 + r)[member.rank] for r in range(2)])
    buffer.destroy()
    return (back - sent).abs().max().item(), counts.tolist(), stats.tolist(), tuple(scales.shape)


def test_scales_travel_too(on_ranks):
    for wrong, counts, stats, shape in on_ranks(2, _with_scales):
        assert wrong < 0.5
        assert (counts, stats, shape) == ([2], [2], (1, 3 * M, 1))


def test_a_buffer_that_is_too_small():
    buffer = ElasticBuffer(HashStore(), 0)
    buffer.update_memory_buffers(2, 1, 128)
    assert (buffer.max_ranks, buffer.num_experts_per_rank, buffer.num_rdma_bytes) == (2, 1, 128)
    assert buffer.get_rdma_size_hint(128, 7168, 8, 256) == 1908410496
    buffer.connect_ranks([0])
    with pytest.raises(AssertionError, match=r"num_rdma_bytes=128 is less than the \d+ bytes of Facts"):
        buffer.dispatch(torch.ones(1, H, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64), M)
    buffer.destroy()

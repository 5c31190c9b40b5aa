import inspect

import pytest
import torch
import torch.distributed as dist

import tcomm.deep_ep
from tcomm.groups.moe.buffer import Buffer
from tcomm.groups.moe.buffer_config import Config
from tcomm.groups.moe.overlap import EventOverlap
from tcomm.groups.moe.routing import make_layout
from tests.groups.all2all.worlds import told

SIGNATURES = {
    "__init__": (
        "self, group, num_nvl_bytes, num_rdma_bytes, low_latency_mode, num_qps_per_rank,"
        " allow_nvlink_for_low_latency_mode, allow_mnnvl, explicitly_destroy, enable_shrink, comm"
    ),
    "get_dispatch_layout": (
        "self, topk_idx, num_experts, previous_event, async_finish, allocate_on_comm_stream"
    ),
    "dispatch": (
        "self, x, handle, num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank,"
        " num_tokens_per_expert, topk_idx, topk_weights, expert_alignment, num_worst_tokens, config,"
        " previous_event, async_finish, allocate_on_comm_stream"
    ),
    "combine": (
        "self, x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream"
    ),
    "low_latency_dispatch": (
        "self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,"
        " cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats, use_fp8, round_scale,"
        " use_ue8m0, async_finish, return_recv_hook"
    ),
    "low_latency_combine": (
        "self, x, topk_idx, topk_weights, handle, use_logfmt, zero_copy, async_finish, return_recv_hook,"
        " out, combine_wait_recv_cost_stats"
    ),
    "clean_low_latency_buffer": "self, num_max_dispatch_tokens_per_rank, hidden, num_experts",
    "get_low_latency_rdma_size_hint": "num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts",
    "get_next_low_latency_combine_buffer": "self, handle",
    "low_latency_update_mask_buffer": "self, rank_to_mask, mask",
    "low_latency_query_mask_buffer": "self, mask_status",
    "low_latency_clean_mask_buffer": "self",
    "set_num_sms": "new_num_sms",
    "get_dispatch_config": "num_ranks",
    "get_combine_config": "num_ranks",
    "capture": "",
    "is_sm90_compiled": "",
    "destroy": "self",
}


@pytest.mark.parametrize("method", SIGNATURES)
def test_arguments_have_the_order_of_deep_ep(method):
    parameters = inspect.signature(getattr(Buffer, method)).parameters.values()
    listed = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert ", ".join(listed) == SIGNATURES[method]


def test_only_the_import_changes():
    assert tcomm.deep_ep.__all__ == ["Buffer", "Config", "EventOverlap"]
    assert (tcomm.deep_ep.Buffer, tcomm.deep_ep.Config) == (Buffer, Config)
    assert tcomm.deep_ep.EventOverlap is EventOverlap


def test_what_needs_no_group(monkeypatch):
    monkeypatch.setattr(Buffer, "num_sms", 20)
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256) == 1908410496
    assert Buffer.get_low_latency_rdma_size_hint(256, 2048, 2, 64) == 272630400
    Buffer.set_num_sms(24)
    assert Buffer.num_sms == 24
    assert Buffer.get_dispatch_config(3) == Buffer.get_combine_config(160) == Config(24)
    with pytest.raises(AssertionError, match="SM count must be even: 7"):
        Buffer.set_num_sms(7)
    for config in (Buffer.get_dispatch_config, Buffer.get_combine_config):
        with pytest.raises(AssertionError, match="Unsupported number of EP ranks: 0"):
            config(0)
    assert Buffer.is_sm90_compiled() is True
    assert Buffer.capture().event is None


E, K, H, TOKENS = 4, 2, 16, (2, 1)
IDX = ([[0, 3], [1, -1]], [[2, 3]])
WEIGHTS = ([[0.5, 0.25], [2.0, 0.0]], [[1.0, -0.5]])


def _token(rank, number):
    return torch.arange(H) / 8 + 4 * rank + number


def _inputs(rank):
    x = torch.stack([_token(rank, number) for number in range(TOKENS[rank])]).to(torch.bfloat16)
    return x, torch.tensor(IDX[rank]), torch.tensor(WEIGHTS[rank])


def _dense(rank):
    """Expert e multiplies by e + 1."""
    x, idx, weights = _inputs(rank)
    factors = ((idx + 1) * weights * (idx >= 0)).sum(1)
    return x.float() * factors[:, None]


def _high_throughput(member):
    member.process_group()
    buffer = Buffer(dist.group.WORLD, 1 << 20, explicitly_destroy=True, timeout=20)
    x, idx, weights = _inputs(member.rank)
    before = Buffer.capture()
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
        idx, E, before, async_finish=True, allocate_on_comm_stream=True
    )
    rows, ids, got_weights, counts, handle, event = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=weights,
        config=Buffer.get_dispatch_config(2),
        previous_event=event,
        async_finish=True,
    )
    event.current_stream_wait()
    # Local ids to global ones; who has no expert goes to one that adds nothing here.
    offset = member.rank * E // 2
    foreign = E - 1 if offset == 0 else 0
    experts = torch.where(ids == -1, foreign, ids + offset)
    factors = ((experts + 1) * got_weights).sum(1)
    combined, none, event = buffer.combine(
        (rows.float() * factors[:, None]).to(torch.bfloat16), handle, config=Buffer.get_combine_config(2)
    )
    again = buffer.dispatch(x + 1, handle)
    aligned = buffer.dispatch(
        x, None, per_rank, None, in_rank, per_expert, idx, weights, expert_alignment=4, num_worst_tokens=0
    )
    padded = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights, num_worst_tokens=5)
    bias = torch.ones_like(x)
    _, back, _ = buffer.combine(rows, handle, got_weights)
    biased = buffer.combine(torch.zeros_like(rows), handle, None, (bias, bias))[0]
    found = {
        "layout": (per_rank.tolist(), per_rdma_rank, per_expert.tolist(), in_rank.int().tolist()),
        "rows": rows.float().tolist(),
        "ids": ids.tolist(),
        "counts": counts,
        "handle": (len(handle), handle[0].tolist(), handle[3].tolist(), handle[4].int().tolist()),
        "combined": (combined.float() - _dense(member.rank)).abs().max().item(),
        "none": none,
        "again": (torch.equal(again[0], rows + 1), again[1:5]),
        "aligned": aligned[3],
        "padded": (len(padded[0]), padded[3], padded[1][len(rows) :].eq(-1).all().item()),
        "back": torch.equal(back, weights * (idx >= 0)),
        "biased": biased.float().unique().tolist(),
        "refused": _high_throughput_refusals(buffer, x, idx, weights, handle, per_rank, per_expert),
    }
    buffer.destroy()
    buffer.destroy()
    found["destroyed"] = told(buffer.dispatch, x, handle)
    dist.destroy_process_group()
    return found


def _high_throughput_refusals(buffer, x, idx, weights, handle, per_rank, per_expert):
    small = Buffer(dist.group.WORLD)
    return [
        told(buffer.dispatch, x, topk_idx=idx, topk_weights=weights),
        told(buffer.dispatch, x, None, per_rank, None, None, per_expert, idx, weights),
        told(buffer.dispatch, x, handle, topk_idx=idx),
        told(buffer.combine, x, handle, allocate_on_comm_stream=True),
        told(buffer.get_dispatch_layout, idx, E, None, True, True),
        told(small.dispatch, x, handle),
        told(buffer.low_latency_dispatch, x, idx, 4, E),
    ]


def test_the_high_throughput_calls(on_ranks):
    first, second = on_ranks(2, _high_throughput)
    assert first["layout"] == ([2, 1], None, [1, 1, 0, 1], [[1, 1], [1, 0]])
    assert second["layout"] == ([0, 1], None, [0, 0, 1, 1], [[0, 1]])
    assert first["rows"] == [_token(0, 0).tolist(), _token(0, 1).tolist()]
    assert second["rows"] == [_token(0, 0).tolist(), _token(1, 0).tolist()]
    assert (first["ids"], first["counts"]) == ([[0, -1], [1, -1]], [1, 1])
    assert (second["ids"], second["counts"]) == ([[-1, 1], [0, 1]], [1, 2])
    assert first["handle"] == (6, [[2, 1], [2, 2]], [0, 1], [[1, 1], [1, 0]])
    assert second["handle"] == (6, [[2, 1], [2, 2]], [0, 0], [[0, 1]])
    assert (first["aligned"], second["aligned"]) == ([4, 4], [4, 4])
    for found in (first, second):
        assert found["combined"] < 0.06
        assert found["none"] is None
        assert found["again"] == (True, (None, None, None, None))
        assert found["padded"] == (5, [], True)
        assert found["back"]
        assert found["biased"] == [2.0]
        texts = [text for _, text in found["refused"]]
        assert all("AssertionError" in kinds for kinds, _ in found["refused"])
        assert all("takes num_tokens_per_rank, is_token_in_rank and" in text for text in texts[:2])
        assert "rows go as before" in texts[2]
        assert all("takes both previous_event and async_finish" in text for text in texts[3:5])
        assert "num_nvl_bytes=0 has no memory" in texts[5]
        assert "low_latency_mode=False has no" in texts[6]
        assert "was destroyed" in found["destroyed"][1]


M = 4


def _low_latency(member):
    member.process_group()
    nbytes = Buffer.get_low_latency_rdma_size_hint(M, H, 2, E)
    options = {"low_latency_mode": True, "explicitly_destroy": True, "timeout": 20}
    buffer = Buffer(dist.group.WORLD, 0, nbytes, **options)
    buffer.clean_low_latency_buffer(M, H, E)
    x, idx, weights = _inputs(member.rank)
    stats = torch.zeros(E // 2, dtype=torch.int32)
    waits = torch.zeros(2, 2, dtype=torch.int64)
    found, results = {}, []
    for hooked in (False, True):
        rows, counts, handle, event, hook = buffer.low_latency_dispatch(
            x, idx, M, E, stats, waits, False, False, False, not hooked, hooked
        )
        if hooked:
            hook()
        event.current_stream_wait()
        factors = torch.arange(1, 3) + member.rank * 2
        y = (rows.float() * factors[:, None, None]).to(torch.bfloat16)
        if hooked:
            lent = buffer.get_next_low_latency_combine_buffer(handle)
            y = lent.copy_(y)
        out = torch.empty_like(x)
        combined, event, hook = buffer.low_latency_combine(
            y, idx, weights, handle, zero_copy=hooked, return_recv_hook=hooked, out=out
        )
        if hooked:
            hook()
        results.append((combined.float() - _dense(member.rank)).abs().max().item())
        found["counts"] = counts.tolist()
        found["handle"] = (handle[0].shape, handle[1].shape, *handle[2:5])
        found["out"] = combined is out
    found["results"], found["stats"] = results, stats.tolist()
    found["waits"] = waits[1 - member.rank].tolist()
    found["refused"] = [
        told(buffer.low_latency_dispatch, x, idx, M, E, async_finish=True, return_recv_hook=True),
        told(buffer.low_latency_dispatch, x, idx, 2 * M, E),
        told(buffer.clean_low_latency_buffer, 2 * M, H, E),
        told(buffer.low_latency_combine, y, idx, weights, handle, True),
        told(buffer.low_latency_combine, y, idx, weights, handle, False, False, True, True),
        told(buffer.low_latency_combine, y, idx, weights, handle, combine_wait_recv_cost_stats=waits),
        told(buffer.get_next_low_latency_combine_buffer, handle),
        told(buffer.dispatch, x, None, *([torch.ones(2)] * 4), idx),
    ]
    buffer.destroy()
    dist.destroy_process_group()
    return found


def test_the_low_latency_calls(on_ranks):
    for rank, found in enumerate(on_ranks(2, _low_latency)):
        assert max(found["results"]) < 0.06
        assert found["counts"] == [[1, 1], [1, 2]][rank]
        assert found["stats"] == [[2, 2], [2, 4]][rank]
        assert found["handle"] == ((2, 2 * M), (2, 2), M, H, E)
        assert found["out"]
        assert found["waits"] == [0, 0]
        texts = [text for _, text in found["refused"]]
        assert texts[0] == texts[4] == "async_finish and return_recv_hook exclude each other"
        assert texts[1] == texts[2]
        assert f"bytes of {2 * M} tokens of {H} channels for {E} experts" in texts[1]
        assert texts[3] == texts[5]
        assert "CapabilityError" in found["refused"][3][0]
        assert "it was combined" in texts[6]
        assert "num_nvl_bytes=0" in texts[7]


def _masks(member):
    """Both leave the other out, and take it in again."""
    member.process_group()
    nbytes = Buffer.get_low_latency_rdma_size_hint(M, H, 2, E)
    options = {"low_latency_mode": True, "explicitly_destroy": True, "enable_shrink": True, "timeout": 20}
    buffer = Buffer(dist.group.WORLD, 0, nbytes, **options)
    x, idx, _ = _inputs(member.rank)
    mask, seen = torch.full((2,), 7, dtype=torch.int32), []
    early = told(buffer.low_latency_update_mask_buffer, 1, True)
    buffer.low_latency_query_mask_buffer(mask)
    seen.append(mask.tolist())
    buffer.low_latency_dispatch(x, idx, M, E, use_fp8=False)
    member.meet("dispatched")
    buffer.low_latency_update_mask_buffer(1 - member.rank, True)
    buffer.low_latency_query_mask_buffer(mask)
    seen.append(mask.tolist())
    counts = buffer.low_latency_dispatch(x, idx, M, E, use_fp8=False)[1].tolist()
    member.meet("alone")
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(mask)
    seen.append(mask.tolist())
    buffer.destroy()
    dist.destroy_process_group()
    return seen, counts, early


def test_ranks_are_left_out_and_taken_in(on_ranks):
    for rank, (seen, counts, early) in enumerate(on_ranks(2, _masks)):
        assert seen[0] == seen[2] == [0, 0]
        assert seen[1] == [int(r != rank) for r in range(2)]
        assert counts == [1, 1]
        assert "call low_latency_dispatch() first" in early[1]


def test_a_layout_is_counted_by_the_engine(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "tcomm.groups.moe.buffer.make_layout", lambda *a: seen.append(a[3]) or make_layout(*a[:3])
    )
    buffer = Buffer.__new__(Buffer)
    buffer.group_size, buffer._engine = 2, ""
    assert buffer.get_dispatch_layout(torch.tensor([[0, 3]]), 4)[0].tolist() == [1, 1]
    buffer._engine = "triton"
    buffer.get_dispatch_layout(torch.tensor([[0, 3]]), 4)
    assert seen == ["cpu", "triton"]

"""Code as it is written for `deep_ep`, with only the import changed: the calls of its README."""

import inspect

import pytest
import torch
import torch.distributed as dist

from tcomm.deep_ep import Buffer, EventOverlap

HIDDEN, EXPERTS, TOP_K, MOST = 256, 8, 3, 6

_buffer = None


def get_buffer(group, hidden_bytes):
    global _buffer
    num_nvl_bytes, num_rdma_bytes = 0, 0
    for config in (Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size())):
        num_nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size()), num_nvl_bytes)
        num_rdma_bytes = max(config.get_rdma_buffer_size_hint(hidden_bytes, group.size()), num_rdma_bytes)
    if (
        _buffer is None
        or _buffer.group != group
        or _buffer.num_nvl_bytes < num_nvl_bytes
        or _buffer.num_rdma_bytes < num_rdma_bytes
    ):
        _buffer = Buffer(group, num_nvl_bytes, num_rdma_bytes)
    return _buffer


def dispatch_forward(x, topk_idx, topk_weights, num_experts, previous_event=None):
    (
        num_tokens_per_rank,
        num_tokens_per_rdma_rank,
        num_tokens_per_expert,
        is_token_in_rank,
        previous_event,
    ) = _buffer.get_dispatch_layout(
        topk_idx,
        num_experts,
        previous_event=previous_event,
        async_finish=True,
        allocate_on_comm_stream=previous_event is not None,
    )
    return _buffer.dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        num_tokens_per_rank=num_tokens_per_rank,
        num_tokens_per_rdma_rank=num_tokens_per_rdma_rank,
        is_token_in_rank=is_token_in_rank,
        num_tokens_per_expert=num_tokens_per_expert,
        previous_event=previous_event,
        async_finish=True,
        allocate_on_comm_stream=True,
    )


def dispatch_backward(grad_recv_x, grad_recv_topk_weights, handle):
    return _buffer.combine(grad_recv_x, handle, topk_weights=grad_recv_topk_weights, async_finish=True)


def combine_forward(x, handle, previous_event=None):
    combined_x, _, event = _buffer.combine(
        x,
        handle,
        async_finish=True,
        previous_event=previous_event,
        allocate_on_comm_stream=previous_event is not None,
    )
    return combined_x, event


def combine_backward(grad_combined_x, handle, previous_event=None):
    grad_x, _, _, _, _, event = _buffer.dispatch(
        grad_combined_x,
        handle=handle,
        async_finish=True,
        previous_event=previous_event,
        allocate_on_comm_stream=previous_event is not None,
    )
    return grad_x, event


def _routes(rank, seed):
    generator = torch.Generator().manual_seed(10 * seed + rank)
    idx = torch.rand(MOST - rank, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    return idx, torch.rand(MOST - rank, TOP_K, generator=generator)


def _training(member):
    member.process_group()
    group = dist.new_group(list(range(member.world_size)))
    Buffer.set_num_sms(24)
    buffer = get_buffer(group, HIDDEN * 2)
    assert get_buffer(group, HIDDEN * 2) is buffer
    idx, weights = _routes(member.rank, 1)
    x = torch.randn(len(idx), HIDDEN).bfloat16()
    rows, ids, got, counts, handle, event = dispatch_forward(x, idx, weights, EXPERTS)
    event.current_stream_wait()
    assert counts == [int((ids == e).sum()) for e in range(EXPERTS // member.world_size)]
    with EventOverlap():
        y = rows
    copies = (idx // (EXPERTS // 2) == 0).any(1).float() + (idx // (EXPERTS // 2) == 1).any(1)
    out, event = combine_forward(y, handle, Buffer.capture())
    event.current_stream_wait()
    assert torch.equal(out, (x.float() * copies[:, None]).bfloat16())
    grad_y, event = combine_backward(x, handle, Buffer.capture())
    assert torch.equal(grad_y, rows)
    grad_x, grad_weights, event = dispatch_backward(rows, got, handle)
    event.current_stream_wait()
    assert torch.equal(grad_x, out)
    assert torch.equal(grad_weights, weights)


def test_training_and_prefilling(on_ranks):
    on_ranks(2, _training)


def _decoding(member):
    """Two micro-batches: while one is on its way, the other is computed."""
    member.process_group()
    group = dist.group.WORLD
    num_rdma_bytes = Buffer.get_low_latency_rdma_size_hint(MOST, HIDDEN, group.size(), EXPERTS)
    assert EXPERTS % group.size() == 0
    buffer = Buffer(group, 0, num_rdma_bytes, low_latency_mode=True, num_qps_per_rank=EXPERTS // group.size())
    held = EXPERTS // group.size()
    factors = torch.arange(held) % 4 + 1 + member.rank

    def dispatch(seed):
        idx, weights = _routes(member.rank, seed)
        x = torch.randn(len(idx), HIDDEN).bfloat16()
        rows, counts, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, MOST, EXPERTS, use_fp8=False, async_finish=False, return_recv_hook=True
        )
        return x, idx, weights, rows, counts, handle, hook

    def combine(batch):
        _, idx, weights, rows, _, handle, _ = batch
        y = (rows.float() * factors[:, None, None]).bfloat16()
        out, _, hook = buffer.low_latency_combine(
            y, idx, weights, handle, async_finish=False, return_recv_hook=True
        )
        return out, hook

    def check(batch, out):
        x, idx, weights = batch[:3]
        scale = ((idx % held % 4 + 1 + idx // held) * weights).sum(1, keepdim=True)
        assert torch.allclose(out.float(), x.float() * scale, rtol=0.03, atol=0.06)

    last = None
    for step in range(4):
        first, second = dispatch(2 * step), dispatch(2 * step + 1)
        first[-1]()
        first_out, first_hook = combine(first)
        second[-1]()
        if last is not None:
            check(*last)
        first_hook()
        check(first, first_out)
        second_out, second_hook = combine(second)
        if step % 2:
            second_hook()
        # Else the next call completes it.
        last = second, second_out
    second_hook()
    check(second, second_out)


def test_decoding_with_two_micro_batches(on_ranks):
    on_ranks(2, _decoding)


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        ("__init__", {"num_nvl_bytes": 0, "num_rdma_bytes": 0, "low_latency_mode": False,
                      "num_qps_per_rank": 24, "allow_nvlink_for_low_latency_mode": True, "allow_mnnvl": False,
                      "explicitly_destroy": False, "enable_shrink": False, "comm": None}),
        ("get_dispatch_layout", {"previous_event": None, "async_finish": False,
                                 "allocate_on_comm_stream": False}),
        ("dispatch", {"handle": None, "num_tokens_per_rank": None, "num_tokens_per_rdma_rank": None,
                      "is_token_in_rank": None, "num_tokens_per_expert": None, "topk_idx": None,
                      "topk_weights": None, "expert_alignment": 1, "num_worst_tokens": 0, "config": None,
                      "previous_event": None, "async_finish": False, "allocate_on_comm_stream": False}),
        ("combine", {"topk_weights": None, "bias": None, "config": None, "previous_event": None,
                     "async_finish": False, "allocate_on_comm_stream": False}),
        ("low_latency_dispatch", {"cumulative_local_expert_recv_stats": None,
                                  "dispatch_wait_recv_cost_stats": None, "use_fp8": True,
                                  "round_scale": False, "use_ue8m0": False, "async_finish": False,
                                  "return_recv_hook": False}),
        ("low_latency_combine", {"use_logfmt": False, "zero_copy": False, "async_finish": False,
                                 "return_recv_hook": False, "out": None,
                                 "combine_wait_recv_cost_stats": None}),
    ],
)  # fmt: skip
def test_what_is_left_out_means_the_same(method, defaults):
    parameters = inspect.signature(getattr(Buffer, method)).parameters.values()
    given = [p for p in parameters if p.kind is not p.KEYWORD_ONLY and p.default is not p.empty]
    assert {p.name: p.default for p in given} == defaults

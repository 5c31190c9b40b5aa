import pytest
import torch
import torch.distributed as dist

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.all2all.flashinfer import (
    FlashInferAllToAllManager,
    FlashInferNVLinkOneSidedManager,
    FlashInferNVLinkTwoSidedManager,
)

HIDDEN = 32


def refused(kind, told, call):
    with pytest.raises(kind, match=told):
        call()


def _two_sided(member):
    member.process_group()
    manager = FlashInferNVLinkTwoSidedManager(dist.group.WORLD)
    manager.cleanup()
    rank, world = member.rank, member.world_size
    x, ids = torch.full((2, HIDDEN), float(rank + 1)), torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)
    told = [manager.initialized, manager.get_handle({"any": 1}) is manager]
    refused(UsageError, "prepare has no rings", lambda: manager.prepare(ids, torch.ones(2, 2), 2, 4))
    refused(UsageError, "alltoallv has no rings", lambda: manager.alltoallv(x, None))
    # The number of GPUs, and not the function that counts them.
    refused(ConfigError, "gpus_per_node", lambda: manager.initialize(world, rank, torch.cuda.device_count))
    refused(ConfigError, "is not this one", lambda: manager.initialize(world, rank + 1, 8))
    told += [manager.ensure_alltoall_workspace_initialized() for _ in range(2)]
    rings = manager._exchange
    manager.initialize(world, rank, 8)
    told += [manager._exchange is rings, manager.initialized]
    info, got, weights = manager.prepare(ids, torch.tensor([[0.5, 0.25], [1.0, 0.0]]), 2, 4)
    values = manager.alltoallv(x.to(torch.uint8).view(2, HIDDEN)[:, : HIDDEN // 2].contiguous(), info)
    scales = manager.alltoallv(x.to(torch.uint8)[:, : HIDDEN // 16].contiguous(), info)
    rows = manager.alltoallv(x, info)
    combined = manager.combine(rows, info, 2)
    refused(NotImplementedError, "combine by sizes", lambda: manager.combine(rows))
    refused(NotImplementedError, "no dispatch", lambda: manager.dispatch(x, x))
    count = int(info.received.sum())
    seen = values[:count, 0].tolist(), scales[:count, 0].tolist(), rows[:count, 0].tolist()
    told += [got[0].tolist(), weights[0].tolist(), *seen, torch.equal(combined, x)]
    manager.cleanup()
    told.append(manager.initialized)
    manager.initialize(world, rank, 8)
    manager.destroy()
    return told, manager.initialized


def test_two_sided(on_ranks):
    lifecycle = [False, True, True, True, True, True]
    (first, after), (second, _) = on_ranks(2, _two_sided)
    assert not after
    arrived = [[1, 1, 2, 2], [1, 1, 2, 2], [1.0, 1.0, 2.0, 2.0]]
    assert first == [*lifecycle, [0, 1], [0.5, 0.25], *arrived, True, False]
    assert second == [*lifecycle, [4, 4], [0.0, 0.0], [], [], [], True, False]
    assert FlashInferAllToAllManager is FlashInferNVLinkTwoSidedManager


def _alone(member):
    member.process_group()
    manager = FlashInferAllToAllManager(dist.group.WORLD)
    return manager.ensure_alltoall_workspace_initialized(), manager.initialized


def test_a_group_of_one_needs_no_rings(on_ranks):
    assert on_ranks(1, _alone) == [(False, False)]


def _once(exchange, value, runtime_max, hidden=HIDDEN):
    """A token for the first expert of each rank, as NVFP4 values, scales, ids and weights."""
    world = exchange.workspace.world_size
    held = exchange.num_experts // world
    ids = torch.tensor([[0, held]], dtype=torch.int32)
    values = torch.full((1, hidden // 2), value, dtype=torch.uint8)
    scales = torch.full((1, hidden // 16), value + 1, dtype=torch.uint8)
    got = exchange.dispatch(
        ids,
        [values, scales, ids, torch.ones(1, 2)],
        runtime_max,
        invalid_token_expert_id=exchange.num_experts,
    )
    seen = [one[:, 0].flatten(1).tolist() for one in got[:2]]
    made = got[0][:, :, :1].to(torch.bfloat16).expand(-1, -1, hidden).contiguous()
    return seen, exchange.combine(made, runtime_max)[0, 0].item()


def _one_sided(member):
    member.process_group()
    manager = FlashInferNVLinkOneSidedManager(dist.group.WORLD)
    manager.cleanup()
    told = [manager.initialized]
    refused(UsageError, "no workspace", lambda: manager.get_handle({}))
    refused(UsageError, "no workspace", manager.get_communication)
    refused(ValueError, "extra_nbytes_per_token=-1", lambda: manager.initialize(4, 2, 4, HIDDEN, -1))
    refused(ConfigError, "hidden_size=0", lambda: manager.initialize(4, 2, 4, 0))
    manager.initialize(4, 2, 4, HIDDEN)
    first = manager.get_handle({})
    manager.initialize(4, 2, 4, HIDDEN)
    manager.initialize(2, 2, 4, HIDDEN // 2)
    told += [manager.initialized, manager.get_communication() is first]
    layout = first.layout
    told.append((layout.max_num_tokens, layout.dispatch_nbytes_per_token, layout.combine_nbytes_per_token))
    refused(AssertionError, "top_k=3 of 4", lambda: manager.initialize(4, 3, 4, HIDDEN))
    refused(AssertionError, "top_k=2 of 8", lambda: manager.initialize(4, 2, 8, HIDDEN))
    told.append(_once(first, 10 * member.rank, 4))
    refused(NotImplementedError, "no dispatch", lambda: manager.dispatch(torch.ones(1), torch.ones(1)))
    first.dispatch(torch.zeros(0, 2, dtype=torch.int32), [], 4)
    refused(UsageError, "cannot grow", lambda: manager.initialize(8, 2, 4, HIDDEN))
    first.combine(torch.zeros(2, 4, 1, dtype=torch.bfloat16), 4)
    manager.initialize(8, 2, 4, HIDDEN // 2, 100)
    second = manager.get_handle({})
    layout = second.layout
    told.append((layout.max_num_tokens, layout.dispatch_nbytes_per_token, layout.combine_nbytes_per_token))
    told += [second is not first, _once(second, 10 * member.rank + 1, 8)]
    manager.cleanup()
    told.append(manager.initialized)
    manager.initialize(2, 2, 4, HIDDEN)
    manager.destroy()
    return told, manager.initialized


def test_one_sided(on_ranks):
    for rank, (told, after) in enumerate(on_ranks(2, _one_sided)):
        assert not after
        values = [[[b] * 16 for b in (0, 10)], [[b] * 2 for b in (1, 11)]]
        more = [[[b] * 16 for b in (1, 11)], [[b] * 2 for b in (2, 12)]]
        assert told == [
            False, True, True, (4, 16 + 2 + 16, 64), (values, 20.0 * rank),
            (8, 8 + 1 + 16 + 100, 64), True, (more, 20.0 * rank + 2), False,
        ]  # fmt: skip

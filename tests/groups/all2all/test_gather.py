import pytest
import torch

from tcomm.groups.all2all.gather import AgRsAll2AllManager
from tcomm.groups.all2all.metadata import DPMetadata, use_metadata
from tests.groups.all2all.worlds import replicas, told

H, E, K = 6, 8, 2


def _tokens(rank, rows):
    """Hidden states, logits, weights and ids of a rank, each made of who has them."""
    base = torch.arange(rows).float() + 1000 * (rank + 1)
    hidden = base[:, None] + torch.zeros(H)
    return hidden, base[:, None] + torch.zeros(E), -base[:, None] + torch.zeros(K), _ids(rank, rows)


def _ids(rank, rows):
    return torch.arange(rows * K).reshape(rows, K) + 100 * rank


def _equal(got, want):
    return [
        f"{a} is not {b}"
        for a, b in zip(got, want, strict=True)
        if a.dtype != b.dtype or not torch.equal(a, b)
    ]


def _both_forms(manager, group, rows, by_sequence):
    """Wrong tensors, after a dispatch in each form among ranks with such numbers of tokens."""
    everyone = [_tokens(rank, size) for rank, size in enumerate(rows)]
    hidden, logits, weights, ids = everyone[group.rank_in_group]
    wanted = [torch.cat(parts) for parts in zip(*everyone, strict=True)]
    bad = _equal(manager.dispatch(hidden, weights, ids, by_sequence, sizes=rows), [wanted[0], *wanted[2:]])
    bad += _equal(manager.dispatch(hidden, logits, by_sequence, sizes=rows), wanted[:2])
    bad += _equal(
        manager.dispatch(hidden, router_logits=logits, is_sequence_parallel=by_sequence, sizes=rows),
        wanted[:2],
    )
    *first, extras = manager.dispatch_router_logits(
        hidden, logits, by_sequence, [ids, hidden[:, 0]], sizes=rows
    )
    bad += _equal([*first, *extras], [*wanted[:2], wanted[3], wanted[0][:, 0]])
    *first, extras = manager.dispatch(hidden, weights, ids, by_sequence, [], sizes=rows)
    bad += _equal(first, [wanted[0], *wanted[2:]]) + ([] if extras == [] else ["extras"])
    # Every rank puts in its row's number and its own thousand: what comes back is known in closed form.
    total = sum(rows)
    x = (torch.arange(total).float() + 1000 * (group.rank_in_group + 1))[:, None] + torch.zeros(H)
    start, mine = sum(rows[: group.rank_in_group]), rows[group.rank_in_group]
    numbers = torch.arange(start, start + mine).float() * len(rows) + 1000 * sum(range(1, len(rows) + 1))
    combined = manager.combine(x, by_sequence, sizes=rows)
    bad += _equal([combined], [numbers[:, None] + torch.zeros(H)])
    output = torch.zeros(mine, H)
    with use_metadata(DPMetadata(torch.tensor(0), torch.tensor([]), rows)):
        given = manager.combine_into_output(x, output, by_sequence)
    return bad + _equal([output], [combined]) + ([] if given is output else ["another output"])


def _replicas(member):
    with replicas(member, dp=2, tp=member.world_size // 2) as state:
        manager = state.groups["ep"].device_communicator.all2all_manager
        assert type(manager) is AgRsAll2AllManager
        bad = _both_forms(manager, state.groups["dp"], [3, 0], False)
        bad += _both_forms(manager, state.groups["dp"], [2, 2], False)
        uneven = [4, 0, 1, 2][: member.world_size]
        bad += _both_forms(manager, state.groups["ep"], uneven, True)
        bad += _with_metadata(manager, state)
        facts = (manager.dp_rank, manager.dp_world_size, manager.rank, manager.world_size, manager.internode)
        same = manager.dp_group is state.groups["dp"] and manager.tp_group is state.groups["tp"]
        return bad, facts, same, _refusals(manager, state)


def _with_metadata(manager, state):
    """Numbers of tokens as the pass says."""
    tp = state.groups["tp"].world_size
    metadata = DPMetadata(torch.tensor(5), torch.tensor([5, 2]))
    hidden, logits, *_ = _tokens(manager.rank, 5 if manager.dp_rank == 0 else 2)
    share = -(-len(hidden) // tp)
    with use_metadata(metadata):
        with metadata.sp_local_sizes(1):
            gathered = manager.dispatch(hidden, logits)[0]
        with metadata.sp_local_sizes(tp):
            shared = manager.dispatch_router_logits(hidden[:share], logits[:share], True)[0]
        with metadata.chunked_sizes(1, 2, 1) as sizes:
            mine = sizes[manager.dp_rank]
            chunk = manager.dispatch(hidden[:mine], logits[:mine])[0]
    wanted = (7, sum(-(-n // tp) * tp for n in (5, 2)), 3)
    found = (len(gathered), len(shared), len(chunk))
    return [] if found == wanted else [f"{found} rows, not {wanted}"]


def _refusals(manager, state):
    x = torch.ones(3, H)
    return [
        told(manager.dispatch, x, x),
        told(manager.dispatch, x, x, sizes=[1, 1]),
        told(manager.dispatch, x, x[:2], sizes=[3, 3]),
        told(manager.dispatch, x, x, sizes=[3, 3, 3]),
        told(manager.dispatch, x, x, True),
        told(manager.dispatch, x),
        told(manager.combine, x, sizes=[1, 1]),
        told(manager.get_handle, {}),
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_all_tokens_go_to_all_and_sums_come_back(on_ranks, world):
    for rank, (bad, facts, same, refusals) in enumerate(on_ranks(world, _replicas)):
        tp = world // 2
        assert bad == []
        assert facts == (rank // tp, 2, rank, world, False)
        assert same
        texts = [text for _, text in refusals]
        assert all("AssertionError" in kinds for kinds, _ in refusals[:7])
        assert "numbers of tokens are not known" in texts[0]
        assert "a tensor [3, 6] is dispatched with 1 tokens" in texts[1]
        assert "a tensor [2, 6] is dispatched with 3 tokens" in texts[2]
        assert "sizes=[3, 3, 3] for 2 ranks" in texts[3]
        assert "not known" in texts[4]
        assert "logits or weights" in texts[5]
        assert "3 != 2" in texts[6]
        assert "NotImplementedError" in refusals[7][0]
        assert texts[7] == "AgRsAll2AllManager has no get_handle; use dispatch and combine"


def _context_parallel(member):
    with replicas(member, dp=1, pcp=2) as state:
        manager = AgRsAll2AllManager(state.groups["ep"].cpu_group)
        x = torch.full((2, H), float(state.groups["pcp"].rank_in_group))
        gathered, _ = manager.dispatch(x, x)
        combined = manager.combine(gathered + 1)
        return gathered[:, 0].tolist(), combined[:, 0].tolist()


def _context_parallel_replicas(member):
    with replicas(member, dp=2, pcp=2) as state:
        manager = AgRsAll2AllManager(state.groups["ep"].cpu_group)
        x = torch.full((1, H), float(member.rank))
        size = manager._group_of(False).world_size
        gathered, _ = manager.dispatch(x, x, sizes=[1] * size)
        return gathered[:, 0].tolist()


def test_context_parallel_ranks_exchange(on_ranks):
    for rank, found in enumerate(on_ranks(2, _context_parallel)):
        assert found == ([0.0, 0.0, 1.0, 1.0], [2.0 * (rank + 1)] * 2)
    assert on_ranks(4, _context_parallel_replicas) == [[0.0, 1.0, 2.0, 3.0]] * 4


class _Group:
    def __init__(self, world_size):
        self.world_size = world_size


def test_several_replicas_of_context_parallel_ranks_are_not_tensor_parallel():
    manager = AgRsAll2AllManager.__new__(AgRsAll2AllManager)
    manager._around = {"dp": _Group(2), "pcp": _Group(2), "tp": _Group(2), "ep": _Group(8)}
    with pytest.raises(AssertionError, match=r"tokens of 2 DP and 2 PCP ranks .* there are 2 TP ranks"):
        manager._group_of(False)
    assert manager._group_of(True).world_size == 8

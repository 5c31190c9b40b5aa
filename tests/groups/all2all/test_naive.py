import pytest
import torch

from tcomm.groups.all2all.metadata import DPMetadata, use_metadata
from tcomm.groups.all2all.naive import NaiveAll2AllManager
from tests.groups.all2all.worlds import replicas, told

H = 6


def _rows(rank, size):
    return (torch.arange(size).float() + 1000 * (rank + 1))[:, None] + torch.zeros(H)


def _naive(member):
    with replicas(member, dp=2, tp=member.world_size // 2, backend="naive") as state:
        manager = state.groups["ep"].device_communicator.all2all_manager
        assert type(manager) is NaiveAll2AllManager
        found = []
        for kind, rows in (("dp", [3, 0]), ("ep", [4, 0, 1, 2][: member.world_size])):
            group, by_sequence = state.groups[kind], kind == "ep"
            everyone = [_rows(rank, size) for rank, size in enumerate(rows)]
            x, total = everyone[group.rank_in_group], torch.cat(everyone)
            hidden, logits = manager.dispatch(x, -x, by_sequence, sizes=rows)
            found += [torch.equal(hidden, total), torch.equal(logits, -total)]
            hidden, weights, ids = manager.dispatch(x, -x, x.long(), by_sequence, sizes=rows)
            found += [torch.equal(weights, -total), torch.equal(ids, total.long())]
            ends = torch.tensor(rows).cumsum(0)
            found.append(torch.equal(manager.naive_multicast(x, ends, by_sequence), total))
            # Every rank of the EP group adds its own number, TP ranks among them.
            combined = manager.combine(total * (member.rank + 1), by_sequence, sizes=rows)
            found.append(torch.equal(combined, x * sum(range(1, member.world_size + 1))))
        with use_metadata(DPMetadata(torch.tensor(2), torch.tensor([2, 1]))) as metadata:
            x = _rows(0, 2 - manager.dp_rank)
            found.append(len(manager.dispatch(x, x)[0]) == 3)
            found.append(len(manager.combine(torch.ones(3, H))) == len(x))
            share = -(-len(x) // state.groups["tp"].world_size)
            with metadata.sp_local_sizes(state.groups["tp"].world_size) as sizes:
                found.append(len(manager.dispatch(x[:share], x[:share], True)[0]) == sum(sizes))
        return found, _refusals(manager)


def _refusals(manager):
    x = torch.ones(3, H)
    return [
        told(manager.dispatch, x, x, extra_tensors=[], sizes=[3, 3]),
        told(manager.dispatch, x, x),
        told(manager.dispatch, x, x, sizes=[3]),
        told(manager.dispatch, x, x[:2], sizes=[3, 3]),
        told(manager.dispatch, x[:, 0], x[:, 0], sizes=[3, 3]),
        told(manager.dispatch, x, x, sizes=[2, 2]),
        told(manager.naive_multicast, x[0], torch.tensor([3, 6]), False),
        told(manager.combine, x, sizes=[2, 2]),
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_broadcasts_and_one_sum(on_ranks, world):
    for found, refusals in on_ranks(world, _naive):
        assert found == [True] * 15
        texts = [text for _, text in refusals]
        assert "NotImplementedError" in refusals[0][0]
        assert texts[0] == "extra_tensors is not supported for NaiveAll2AllManager"
        assert all("AssertionError" in kinds for kinds, _ in refusals[1:])
        assert "numbers of tokens are not known" in texts[1]
        assert "sizes=[3] for 2 ranks" in texts[2]
        assert "[[3, 6], [2, 6]] are not rows of the same tokens" in texts[3]
        assert "[[3], [3]] are not rows" in texts[4]
        assert "[3, 6] where this rank's tokens are 2" in texts[5]
        assert "[6] over 2 ranks; give [T, c]" in texts[6]
        assert "[3, 6] where all ranks' tokens are 4" in texts[7]

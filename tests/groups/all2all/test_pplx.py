import pytest
import torch

from tcomm.groups.all2all.pplx import AllToAll, PPLXAll2AllManager, Sizes
from tcomm.groups.stateless.group import StatelessProcessGroup
from tests.groups.all2all.worlds import replicas, told

E, K, H, M = 8, 2, 16, 4


def _sizes(rank, world, **others):
    return {
        "max_num_tokens": M, "num_experts": E, "experts_per_token": K, "rank": rank, "world_size": world,
        "dp_size": 1, "hidden_dim": H, "hidden_dim_bytes": 2 * H, "hidden_dim_scale_bytes": 0, **others,
    }  # fmt: skip


def _inputs(replica):
    """Tokens of the ranks of a replica."""
    tokens = 3 - replica
    generator = torch.Generator().manual_seed(replica)
    x = torch.randn(tokens, H, generator=generator).to(torch.bfloat16)
    idx = torch.rand(tokens, E, generator=generator).argsort(1)[:, :K]
    return x, idx, torch.rand(tokens, K, generator=generator)


def _exchange(manager, handle, x, idx, weights, phases, scale=None):
    """Expert e multiplies by e + 1; the rows it gets, and the sum."""
    local = E // manager.world_size
    dispatchers = handle.sizes.num_dispatchers
    counts = torch.zeros(local, dtype=torch.int32)
    rows = torch.zeros(local, M * dispatchers, H, dtype=x.dtype)
    scales = None if scale is None else torch.zeros(local, M * dispatchers, 4)
    for phase in phases:
        handle.dispatch(counts, rows, scales, x, scale, idx.to(torch.uint32), None, *phase)
    factors = torch.arange(local) + 1 + local * manager.rank
    values = rows.float() if scales is None else rows.float() * scales[..., :1]
    y = (values * factors[:, None, None]).to(torch.bfloat16)
    out = torch.zeros(len(x) + 1, H, dtype=torch.bfloat16)
    for phase in phases:
        handle.combine(out, idx, weights, y, None, *phase)
    return counts, out


def _whole(member, tp):
    dp = member.world_size // tp
    with replicas(member, dp=dp, tp=tp, backend="pplx") as state:
        manager = state.groups["ep"].device_communicator.all2all_manager
        assert type(manager) is PPLXAll2AllManager
        handle = manager.get_handle(_sizes(member.rank, member.world_size, dp_size=tp))
        same = manager.get_handle(_sizes(member.rank, member.world_size, dp_size=tp)) is handle
        x, idx, weights = _inputs(manager.dp_rank)
        dense = x.float() * ((idx + 1) * weights).sum(1)[:, None]
        wrong = []
        for phases in ([(True, True)], [(True, False), (False, True)]):
            counts, out = _exchange(manager, handle, x, idx, weights, phases)
            wrong.append((out[: len(x)].float() - dense).abs().max().item())
            wrong.append(out[len(x) :].abs().max().item())
        refused = _refusals(handle, x, idx, weights)
        quantised = manager.get_handle(
            _sizes(member.rank, member.world_size, dp_size=tp, hidden_dim_bytes=H, hidden_dim_scale_bytes=16)
        )
        scale = torch.full((len(x), 4), 0.5)
        packed = x.float().mul(2).to(torch.float8_e4m3fn)
        _, out = _exchange(manager, quantised, packed, idx, weights, [(True, True)], scale)
        dense = packed.float() * 0.5 * ((idx + 1) * weights).sum(1)[:, None]
        wrong.append((out[: len(x)].float() - dense).abs().max().item())
        kept = handle._engine
        manager.destroy()
        manager.destroy()
        refused.append(told(kept.workspace.run, lambda: None))
        return wrong, counts.tolist(), same, refused


def _refusals(handle, x, idx, weights):
    counts, rows = torch.zeros(1, dtype=torch.int32), torch.zeros(1, M, H)
    many = torch.zeros(M + 1, H, dtype=torch.bfloat16)
    return [
        told(handle.dispatch, counts, rows, None, many, None, torch.zeros(M + 1, K)),
        told(handle.dispatch, counts, rows, None, x, None, idx, torch.tensor([M])),
        told(handle.dispatch, counts, rows, None, x[:, :8], None, idx),
        told(handle.dispatch, counts, rows, None, x, None, idx, None, False, True),
        told(handle.combine, x, idx, weights, rows),
        told(handle.combine, x, idx, weights, rows, None, False, True),
    ]


@pytest.mark.parametrize(("world", "tp"), [(2, 1), (4, 2)])
def test_a_layer_in_one_phase_and_in_two_and_with_scales(on_ranks, world, tp):
    found = on_ranks(world, _whole, tp)
    counts = torch.cat([_inputs(replica)[1].flatten() for replica in range(world // tp)]).bincount(
        minlength=E
    )
    assert torch.tensor([found[rank][1] for rank in range(world)]).flatten().tolist() == counts.tolist()
    for wrong, _, same, refused in found:
        assert max(wrong) < 0.06
        assert same
        texts = [text for _, text in refused]
        assert all("AssertionError" in kinds for kinds, _ in refused[:-1])
        assert "it was closed" in texts[-1]
        assert "5 tokens of 5 rows and 5 indices; the exchange is for 4" in texts[0]
        assert "4 tokens of" in texts[1]
        assert "[2, 8]" in texts[2] or "[3, 8]" in texts[2]
        assert "nothing was sent" in texts[3]
        assert "nothing was received" in texts[4]
        assert "nothing was given back" in texts[5]


class Exchange:
    def __init__(self):
        self.dtype, self.layout = torch.bfloat16, type("Layout", (), {"hidden": H})

    def close(self):
        self.closed = True


def test_what_does_not_fit_is_refused():
    group = StatelessProcessGroup(rank=0, world_size=1, store=None, socket=None)
    manager = PPLXAll2AllManager(group)
    for others, text in [
        ({"hidden_dim_bytes": 24}, "hidden_dim_bytes=24 is no multiple of 16"),
        ({"hidden_dim_scale_bytes": 4}, "hidden_dim_scale_bytes=4 is no multiple"),
        ({"dp_size": 2}, "dp_size=2 has to divide the 1 ranks"),
        ({"rank": 1, "world_size": 2}, "rank 1 of 2; this is rank 0 of 1"),
    ]:
        with pytest.raises(AssertionError, match=text):
            manager.get_handle({**_sizes(0, 1), **others})
    with pytest.raises(TypeError):
        manager.get_handle({"max_num_tokens": 3})
    with pytest.raises(NotImplementedError):
        manager.dispatch(torch.ones(1))


def test_ranks_that_share_tokens_divide_them():
    sizes = Sizes(**_sizes(0, 4, dp_size=2, max_num_tokens=7))
    assert (sizes.num_dispatchers, sizes.max_share) == (2, 4)
    assert (sizes.shares(5), sizes.shares(0)) == ([3, 2], [0, 0])


def test_it_ends():
    handle = AllToAll(None, Sizes(**_sizes(0, 1)), None)
    handle._engine = engine = Exchange()
    handle.destroy()
    handle.destroy()
    assert engine.closed

import pytest
import torch

from tcomm.errors import ConfigError
from tcomm.groups.moe.gradients import combine_tokens, dispatch_tokens
from tcomm.groups.moe.high_throughput import HighThroughput
from tcomm.groups.setup import from_store
from tests.groups.moe.layers.test_layers import HIDDEN, NUM_EXPERTS, routes


def _scale(rows, idx, weights, factors):
    chosen = torch.where(idx >= 0, factors[idx.clamp(min=0)] * weights, torch.zeros(()))
    return rows * chosen.sum(1, keepdim=True)


def _backward(member):
    exchange = HighThroughput(
        from_store(member.store, member.rank, member.world_size, "moe"), 1 << 20, timeout=20.0
    )
    count = NUM_EXPERTS // member.world_size
    first = member.rank * count
    found = []
    for turn, num_tokens in enumerate([7, member.rank, 5]):
        x, idx, weights = routes(10 * turn + member.rank, num_tokens, 3)
        push = torch.randn(x.shape)
        factors = torch.arange(1.0, NUM_EXPERTS + 1, requires_grad=True)
        x.requires_grad_()
        weights.requires_grad_()
        (_scale(x, idx, weights, factors) * push).sum().backward()
        wanted = x.grad, weights.grad
        x.grad = weights.grad = None
        mine = factors.detach()[first : first + count].clone().requires_grad_()
        rows, local, came_weights, handle = dispatch_tokens(exchange, x, idx, weights, NUM_EXPERTS)
        assert not local.requires_grad
        y = combine_tokens(exchange, _scale(rows, local, came_weights, mine), handle)
        (y * push).sum().backward()
        found += [
            torch.allclose(a, b, atol=1e-5) for a, b in zip((x.grad, weights.grad), wanted, strict=True)
        ]
        found.append(bool(mine.grad.any()) == bool(len(rows)))
    with pytest.raises(ConfigError, match=r"gradients of torch\.float8_e4m3fn"):
        dispatch_tokens(
            exchange, torch.zeros(1, HIDDEN).to(torch.float8_e4m3fn), idx[:1], weights[:1], NUM_EXPERTS
        )
    exchange.close()
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_the_backward_of_dispatch_is_combine_and_that_of_combine_is_dispatch(on_ranks, world):
    assert on_ranks(world, _backward) == [[True] * 9] * world

import pytest
import torch

from tcomm.errors import ConfigError, GroupClosedError
from tcomm.groups.moe.layers import BACKENDS, MoeShape, make_backend

NUM_EXPERTS, HIDDEN, MOST = 16, 128, 9


class Scaling:
    """Expert e multiplies by e + 1."""

    def __init__(self, rank, world_size):
        count = NUM_EXPERTS // world_size
        self.factors = torch.arange(1.0, NUM_EXPERTS + 1)[rank * count : (rank + 1) * count]

    def flat(self, x, expert_ids, weights):
        factors = torch.where(expert_ids >= 0, self.factors[expert_ids.clamp(min=0)] * weights, 0.0)
        y = x.float() * factors.sum(1, keepdim=True)
        # What no expert here is asked for must not count.
        y[(expert_ids < 0).all(1)] = float("nan")
        return y.to(x.dtype)

    def batched(self, x, counts):
        y = (x.float() * self.factors[:, None, None]).to(x.dtype)
        for expert, count in enumerate(counts.tolist()):
            y[expert, count:] = float("nan")
        return y


def routes(seed, num_tokens, top_k):
    """Tokens, distinct experts with some left out, and weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator)
    idx = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :top_k]
    idx = torch.where(torch.rand(idx.shape, generator=generator) < 0.2, -1, idx)
    return x, idx, torch.rand(num_tokens, top_k, generator=generator)


def wanted(x, idx, weights):
    return x * torch.where(idx >= 0, (idx + 1) * weights, 0.0).sum(1, keepdim=True)


def _forward(member, kinds):
    member.process_group()
    worst, experts = {}, Scaling(member.rank, member.world_size)
    for dtype, use_fp8 in kinds:
        for name in BACKENDS:
            shape = MoeShape(NUM_EXPERTS, 3, HIDDEN, MOST, dtype, use_fp8)
            backend = make_backend(name, shape, timeout=20.0)
            assert backend.wire_nbytes == 0
            for turn, num_tokens in enumerate([MOST, member.rank, 0, 1]):
                x, idx, weights = routes(10 * turn + member.rank, num_tokens, 3)
                y = backend.forward(x.to(dtype), idx, weights, experts)
                right = wanted(x.to(dtype).float(), idx, weights)
                assert y.dtype == dtype
                assert y.shape == right.shape
                far = ((y.float() - right).abs() / (1 + right.abs())).nan_to_num(float("inf"))
                key = (name, str(dtype), use_fp8)
                worst[key] = max([worst.get(key, 0.0), *far.flatten().tolist()])
            moved = backend.wire_nbytes > 0
            assert moved == (member.world_size > 1), name
            backend.close()
            with pytest.raises(GroupClosedError):
                backend.forward(x.to(dtype), idx, weights, experts)
    return worst


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_backend_computes_the_layer(on_ranks, world):
    kinds = [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)][: 2 if world > 2 else 3]
    for worst in on_ranks(world, _forward, kinds):
        assert len(worst) == len(kinds) * len(BACKENDS)
        late = {key: far for key, far in worst.items() if far > (1e-5 if key[1] == "torch.float32" else 6e-2)}
        assert not late


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_experts": 0}, "num_experts=0: give whole numbers of at least 1"),
        ({"top_k": 2.0}, r"top_k=2\.0"),
        ({"hidden": 100, "use_fp8": True}, "hidden=100 with fp8"),
    ],
)
def test_a_shape_that_makes_no_sense_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        MoeShape(
            **{"num_experts": 8, "top_k": 2, "hidden": 128, "max_num_tokens": 4, "dtype": torch.float32}
            | changes
        )


def test_a_backend_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="backend='pigeon': give one of high_throughput, low_latency"):
        make_backend("pigeon", MoeShape(8, 2, 128, 4, torch.float32))


def _uneven(member):
    member.process_group()
    with pytest.raises(ConfigError, match="num_experts=9 do not divide among 2 ranks"):
        make_backend("naive", MoeShape(9, 2, 128, 4, torch.float32))


def test_experts_that_do_not_divide_are_refused(on_ranks):
    on_ranks(2, _uneven)


def test_fp8_halves_a_row_and_its_scales_bring_it_back():
    shape = MoeShape(8, 2, 256, 4, torch.bfloat16, use_fp8=True)
    x = torch.randn(3, 256).to(torch.bfloat16)
    packed = shape.pack(x)
    assert sum(part.nbytes for part in packed) == 3 * shape.row_nbytes == 3 * (256 + 8)
    assert (shape.unpack(packed) - x).abs().amax() < 0.07 * x.abs().amax()
    plain = MoeShape(8, 2, 256, 4, torch.bfloat16)
    assert plain.unpack(plain.pack(x)) is x
    assert plain.row_nbytes == 512

import time

import pytest
import torch

from tcomm.errors import (
    CollectiveMismatchError,
    ConfigError,
    DecodeError,
    GroupClosedError,
    PeerLostError,
)
from tcomm.groups.moe import host_engine
from tcomm.groups.moe.high_throughput import HighThroughput
from tcomm.groups.setup import from_store
from tcomm.memory.token_regions import DispatchRegions, ReturnRegions
from tests.groups.moe.exact_moves import (
    expect_combine,
    expect_dispatch,
    holders_of,
    make_routes,
    make_rows,
    make_weights,
)

KINDS = ("random", "one", "not_first", "none", "random")


def make(member, engine="cpu", num_nbytes=1 << 20, timeout=20.0):
    members = from_store(member.store, member.rank, member.world_size, f"exact/{engine}")
    return HighThroughput(members, num_nbytes, timeout=timeout, engine=engine)


def same(got, want):
    """Whether bits are the same, NaN among them."""
    got, want = got.contiguous(), want.contiguous()
    is_same = got.dtype == want.dtype and got.shape == want.shape
    return is_same and torch.equal(got.view(-1).view(torch.uint8), want.view(-1).view(torch.uint8))


def check_round(exchange, tokens, kind, num_topk, hidden, dtype, seed=0, num_bias=0):
    """A dispatch and a combine of random routes against their meaning; the handle and what was added up."""
    world, me = exchange.world_size, exchange.rank
    num_experts = 8 * world
    idx = make_routes(seed, world, tokens, num_topk, num_experts, kind)
    rows, weights = make_rows(tokens, hidden, dtype, seed), make_weights(seed, tokens, num_topk)
    comes = [expect_dispatch(rank, rows, idx, weights, num_experts) for rank in range(world)]
    come, x, ids, told, counts = comes[me]
    got = exchange.dispatch(rows[me], idx[me], weights[me], num_experts)
    assert same(got.x, x)
    assert same(got.topk_idx, ids)
    assert same(got.topk_weights, told)
    assert got.num_tokens_per_expert == counts
    assert got.handle.recv_src_idx.tolist() == [token for _, token in come]

    results = [(one[1].float() * (1 + rank / 7) + 0.1).to(dtype) for rank, one in enumerate(comes)]
    terms = make_rows([tokens[me]] * num_bias, hidden, dtype, seed + 1)
    bias = (None, *terms)[num_bias] if num_bias < 2 else tuple(terms)
    want = expect_combine(me, idx, num_experts, results, [one[0] for one in comes], terms)
    for _ in range(2):
        out, summed = exchange.combine(results[me], got.handle, got.topk_weights, bias)
        assert same(out, want)
        assert same(summed, weights[me].masked_fill(idx[me] < 0, 0))
    reached = torch.tensor([len(one) for one in holders_of(idx[me], num_experts, world)], dtype=torch.float32)
    back, none = exchange.combine(got.x, got.handle)
    assert none is None
    if dtype == torch.float32:
        assert torch.allclose(back, reached[:, None] * rows[me])
    return got, rows[me], results


def _worlds(member, engine, kinds):
    exchange, world = make(member, engine), member.world_size
    shapes = [([5, 0, 9, 3, 1, 1, 1, 1], 16), ([3] * 8, 24), ([0, 12, 1, 0, 0, 4, 0, 2], 8)]
    for seed, kind in enumerate(KINDS[:kinds]):
        tokens, hidden = shapes[seed % len(shapes)]
        dtype = (torch.bfloat16, torch.float32, torch.float16)[seed % 3]
        check_round(exchange, tokens[:world], kind, 1 + 3 * seed % 8, hidden, dtype, seed, seed % 3)
    check_round(exchange, [0] * world, "random", 2, 8, torch.bfloat16)
    phases = exchange.workspace.traffic.num_phases
    exchange.close()
    return phases


@pytest.mark.parametrize(
    ("world", "engine"),
    [(1, "cpu"), (2, "cpu"), (3, "cpu"), (4, "cpu"), (8, "cpu"), (2, "triton"), (4, "triton")],
)
def test_random_routes_go_there_and_back(on_ranks, world, engine):
    kinds = len(KINDS) if engine == "cpu" else {2: 3, 4: 2}[world]
    calls_in_one_piece = 4 * (kinds + 1)
    assert on_ranks(world, _worlds, engine, kinds) == [calls_in_one_piece] * world


def _oracle(member):
    """The example of the documentation."""
    exchange = make(member)
    idx = [torch.tensor([[0, 3], [1, -1]]), torch.tensor([[2, 3]])][member.rank]
    rows = torch.arange(1, 3)[:, None] + 10 * member.rank * torch.ones(1, 8)
    got = exchange.dispatch(rows[: len(idx)].contiguous(), idx, None, 4)
    out, _ = exchange.combine(got.x, got.handle)
    assert len(got.handle) == 6
    prefix, channel, received, source, in_rank, head = got.handle
    assert got.handle[3] is source
    assert got.topk_weights is None
    return (
        got.x[:, 0].tolist(), got.topk_idx.tolist(), got.num_tokens_per_expert, out[:, 0].tolist(),
        [one.tolist() for one in (prefix, channel, received, source, in_rank, head)],
    )  # fmt: skip


def test_the_small_example(on_ranks):
    first, second = on_ranks(2, _oracle)
    matrix = [[2, 1], [2, 2]]
    assert first == (
        [1.0, 2.0], [[0, -1], [1, -1]], [1, 1], [2.0, 2.0],
        [matrix, [[2], [1]], [[0], [0]], [0, 1], [[True, True], [True, False]], [[0, 0], [1, -1]]],
    )  # fmt: skip
    assert second == (
        [1.0, 11.0], [[-1, 1], [0, 1]], [1, 2], [11.0],
        [matrix, [[0], [1]], [[0], [0]], [0, 0], [[False, True]], [[-1, 0]]],
    )  # fmt: skip


def _pieces(member, engine, tokens, hidden):
    """A buffer of 16 KiB a half; other shapes in between; and twice the same bits."""
    exchange = make(member, engine, 32 << 10)
    for seed in range(2 if engine == "cpu" else 1):
        check_round(exchange, tokens, "random", 3, hidden, torch.bfloat16, seed, seed)
        check_round(exchange, [2] * member.world_size, "one", 2, 8, torch.float32, seed)
    got, _, results = check_round(exchange, tokens, "random", 3, hidden, torch.bfloat16, 5)
    rows = make_rows(tokens, hidden, torch.bfloat16, 5)[member.rank]
    phases = exchange.workspace.traffic.num_phases
    again = exchange.dispatch(rows, None, None, 8 * member.world_size, handle=got.handle)
    assert same(again.x, got.x)
    assert (again.topk_idx, again.topk_weights, again.num_tokens_per_expert, again.handle) == (None,) * 4
    assert exchange.workspace.traffic.num_phases - phases > 1
    bits = exchange.combine(results[member.rank], got.handle)[0]
    assert same(bits, exchange.combine(results[member.rank], got.handle)[0])
    exchange.close()


@pytest.mark.parametrize(
    ("engine", "tokens", "hidden"), [("cpu", [90, 0, 17], 256), ("triton", [9, 0], 2048)]
)
def test_what_does_not_fit_the_buffer_goes_in_pieces(on_ranks, engine, tokens, hidden):
    on_ranks(len(tokens), _pieces, engine, tokens, hidden)


def _payloads(member, engine):
    """fp8 with scales, in both forms; a list that is rounded up; and rows for the worst case."""
    exchange, me, world = make(member, engine), member.rank, member.world_size
    tokens, hidden, num_experts = [4, 7][:world], 640, 4 * member.world_size
    idx, weights = make_routes(3, world, tokens, 2, num_experts), make_weights(3, tokens, 2)
    rows = [one.to(torch.float8_e4m3fn) for one in make_rows(tokens, hidden, torch.float32)]
    for dtype, width in ((torch.float32, 5), (torch.int32, 2)):
        scales = make_rows(tokens, width, dtype, 9)
        got = exchange.dispatch((rows[me], scales[me]), idx[me], weights[me], num_experts, expert_alignment=4)
        come, x, _, _, counts = expect_dispatch(me, rows, idx, weights, num_experts)
        assert same(got.x[0], x)
        assert same(got.x[1], torch.stack([scales[s][t] for s, t in come]))
        assert got.num_tokens_per_expert == [-(-count // 4) * 4 for count in counts]

    plain = make_rows(tokens, 16, torch.bfloat16)
    come, x, ids, told, _ = expect_dispatch(me, plain, idx, weights, num_experts)
    exact = exchange.dispatch(plain[me], idx[me], weights[me], num_experts)
    got = exchange.dispatch(plain[me], idx[me], weights[me], num_experts, num_worst_tokens=11)
    count = len(come)
    assert got.x.shape == (11, 16)
    assert same(got.x[:count], x)
    assert same(got.topk_idx[:count], ids)
    assert same(got.topk_weights[:count], told)
    assert got.topk_idx[count:].eq(-1).all()
    assert got.topk_weights[count:].eq(0).all()
    assert got.num_tokens_per_expert == []
    back = exchange.combine(got.x, got.handle, got.topk_weights)
    assert all(map(same, back, exchange.combine(exact.x, exact.handle, exact.topk_weights)))
    with pytest.raises(ConfigError, match=r"rank \d gets \d+ rows, more than num_worst_tokens=2"):
        exchange.dispatch(plain[me], idx[me], weights[me], num_experts, num_worst_tokens=2)
    check_round(exchange, tokens, "random", 2, 16, torch.bfloat16)
    exchange.close()


@pytest.mark.parametrize("engine", ["cpu", "triton"])
def test_scales_travel_counts_are_rounded_and_room_is_made_for_the_worst(on_ranks, engine):
    on_ranks(2, _payloads, engine)


def _traffic(member):
    exchange, me, world = make(member), member.rank, member.world_size
    tokens, hidden, num_topk, num_experts = [64, 50], 1024, 4, 16
    idx, weights = make_routes(1, world, tokens, num_topk, num_experts), make_weights(1, tokens, num_topk)
    rows = make_rows(tokens, hidden, torch.bfloat16)
    got = exchange.dispatch(rows[me], idx[me], weights[me], num_experts)
    told = [exchange.workspace.traffic.wire_nbytes]
    exchange.combine(got.x, got.handle, got.topk_weights)
    told.append(exchange.workspace.traffic.wire_nbytes - told[0])
    came = expect_dispatch(me, rows, idx, weights, num_experts)[0]
    pairs = sum(source != me for source, _ in came)
    return told, [pairs * (2 * hidden + 8 * num_topk), pairs * (2 * hidden + 4 * num_topk)]


def test_each_row_crosses_once_for_each_rank_that_needs_it(on_ranks):
    for (there, back), (least_there, least_back) in on_ranks(2, _traffic):
        assert least_there <= there <= 1.02 * least_there
        assert back == least_back


def _slowly(member):
    """Ranks that come late, each at other times, and a result that is dropped."""
    exchange = make(member)
    generator = torch.Generator().manual_seed(member.rank)
    for seed in range(6):
        time.sleep(float(torch.rand(1, generator=generator)) * 0.02)
        check_round(exchange, [6, 2, 9, 0], KINDS[seed % 5], 2, 8 + 8 * seed, torch.bfloat16, seed)
    exchange.close()


def test_ranks_may_come_at_any_time(on_ranks):
    on_ranks(4, _slowly)


def _mistakes(member):
    exchange, me = make(member), member.rank
    x, idx = torch.ones(2, 8), torch.tensor([[0, 3], [1, -1]])
    narrow = torch.ones(2, 128).to(torch.float8_e4m3fn)
    got = exchange.dispatch(x, idx, None, 4)
    rows, handle = got.x, got.handle
    phases = exchange.workspace.traffic.num_phases
    for arguments, keywords, told in [
        ((x, idx + 1, None, 4), {}, "token 0 has expert 4 at entry 1; experts are 0 to 3"),
        ((x, idx, None, 3), {}, "num_experts=3 do not divide among 2 ranks"),
        ((x, idx.int(), None, 4), {}, "topk_idx is torch.int32"),
        ((x, idx[:1], None, 4), {}, r"topk_idx is torch.int64 \[1, 2\]; give torch.int64 \[2, 2\]"),
        ((x, idx, idx.double(), 4), {}, "topk_weights is torch.float64"),
        ((x, None, None, 4), {}, "needs topk_idx, or the handle"),
        ((x[:, :7].contiguous(), idx, None, 4), {}, "hidden a multiple of 8"),
        ((x.t(), idx, None, 4), {}, "contiguous"),
        ((x.double(), idx, None, 4), {}, "x is torch.float64"),
        ((narrow, idx, None, 4), {}, "without scales"),
        (((x, x), idx, None, 4), {}, "with scales"),
        (((narrow, torch.ones(2, 2)), idx, None, 4), {}, r"scales torch.float32 \[2, 2\]"),
        ((x, idx, None, 4), {"expert_alignment": 0}, "expert_alignment=0"),
        ((x, idx, None, 4), {"num_worst_tokens": -1}, "num_worst_tokens=-1"),
        ((x, idx, None, 4), {"handle": handle}, "takes no topk_idx"),
        ((x, None, None, 4), {"handle": 3}, "handle is a int"),
        ((x[:1], None, None, 4), {"handle": handle}, "x has 1 tokens, the dispatch of the handle had 2"),
        ((torch.ones(2, 1 << 20), idx, None, 4), {}, "holds no token"),
    ]:
        with pytest.raises(ConfigError, match=told):
            exchange.dispatch(*arguments, **keywords)
    for arguments, told in [
        ((rows[:1], handle), "x has 1 rows, the dispatch of the handle gave"),
        ((rows, None), "handle is a NoneType"),
        ((rows, handle, torch.ones(1, 2)), "topk_weights is"),
        ((rows, handle, None, x.double()), "bias is torch.float64"),
        ((rows, handle, None, (x, x, x)), "bias has 3 tensors"),
        ((rows.double(), handle), "x is torch.float64"),
    ]:
        with pytest.raises(ConfigError, match=told):
            exchange.combine(*arguments)
    assert exchange.workspace.traffic.num_phases == phases
    with pytest.raises(CollectiveMismatchError):
        exchange.dispatch(x, idx, None, 4 + 4 * me)
    other = exchange.dispatch(x, idx[:1].repeat(2, 1), None, 4).handle
    with pytest.raises(CollectiveMismatchError, match="routes of dispatch #2"):
        exchange.dispatch(x, None, None, 4, handle=(handle, other)[me])
    with pytest.raises(CollectiveMismatchError, match="rows of dispatch #1"):
        exchange.combine(rows if me == 0 else torch.ones(other.num_rows, 8), (handle, other)[me])
    check_round(exchange, [2, 5], "random", 2, 8, torch.bfloat16)
    with pytest.raises(ConfigError, match="num_nbytes=0"):
        make(member, num_nbytes=0)
    member.meet("agreed")
    if me == 1:
        exchange.close()
        with pytest.raises(GroupClosedError):
            exchange.combine(rows, handle)
        member.meet("gone")
        return
    member.meet("gone")
    with pytest.raises(PeerLostError, match="rank 1"):
        exchange.combine(rows, handle)


def _too_many(member, engine):
    """Tokens that do not go in one piece, though nobody may ask how many there are, there and back."""
    exchange, me = make(member, engine, 16 << 10), member.rank
    half_nbytes, row_nbytes = exchange.workspace.half_nbytes, 4096
    room = DispatchRegions(half_nbytes, 2, row_nbytes, 1).num_tokens
    many = room + 1
    x, idx = torch.ones(many, row_nbytes // 4), torch.zeros(many, 1, dtype=torch.int64)
    told = f"{many} tokens of which {room} fit"
    for _ in range(2):
        with pytest.raises(CollectiveMismatchError, match=f"rank 1: dispatch .* {told}"):
            exchange.dispatch(x[: many if me else 1], idx[: many if me else 1], None, 2, num_worst_tokens=80)
    with pytest.raises(ConfigError, match=f"{told} the buffer; with num_worst_tokens"):
        exchange.dispatch(x, idx, None, 2, num_worst_tokens=80)
    assert exchange.dispatch(x[:1], idx[:1], None, 2, num_worst_tokens=80).x.shape == (80, row_nbytes // 4)
    if engine == "triton":
        narrow = exchange.dispatch(x[:, :8].contiguous(), idx, None, 2, num_worst_tokens=80)
        # As on a GPU, where no host reads how many tokens there are.
        narrow.handle.most_tokens = None
        room = ReturnRegions(half_nbytes, 1, row_nbytes, 0).num_tokens
        with pytest.raises(ConfigError, match=f"{many} tokens of which {room} fit the buffer; after"):
            exchange.combine(torch.ones(80, row_nbytes // 4), narrow.handle)
    check_round(exchange, [2, 5], "random", 2, 8, torch.bfloat16)
    exchange.close()


@pytest.mark.parametrize("engine", ["cpu", "triton"])
def test_tokens_that_do_not_go_at_once_are_refused_on_all_ranks(on_ranks, engine):
    on_ranks(2, _too_many, engine)


def _stale(member):
    """Rank 1 publishes and leaves the head of its half as it was."""
    exchange, me = make(member), member.rank
    x, idx = torch.ones(2, 8), torch.tensor([[0, 3], [1, -1]])
    if me == 1:
        host_engine.stage = lambda *_: None
        with pytest.raises((DecodeError, PeerLostError)):
            exchange.dispatch(x, idx, None, 4)
    else:
        with pytest.raises(DecodeError, match="rank 1 gave counts"):
            exchange.dispatch(x, idx, None, 4)
    member.meet("found")
    with pytest.raises(PeerLostError, match="was interrupted"):
        exchange.dispatch(x, idx, None, 4)


def test_counts_of_another_call_end_the_exchange_on_all_ranks(on_ranks):
    on_ranks(2, _stale)


def test_mistakes_are_told_before_anything_is_sent_and_the_dead_are_named(on_ranks):
    on_ranks(2, _mistakes)

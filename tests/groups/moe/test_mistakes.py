"""What is given wrongly on one rank is refused there, takes no call, and leaves the exchange as it was."""

import pytest
import torch

from tcomm.errors import ConfigError
from tcomm.memory.control import Word
from tests.groups.moe.routings import ids_of
from tests.groups.moe.test_agreement import EXPERTS, HIDDEN, MOST, TOP_K, open_all, there_and_back

X, W = torch.ones(MOST, HIDDEN), torch.ones(MOST, TOP_K)
IDS = ids_of("full", 1, 0, MOST, TOP_K, EXPERTS)
NARROW = IDS.int()
BACK = torch.ones(2, MOST, HIDDEN)


def _nested(x):
    return torch.nested.nested_tensor(list(x))


def wrongs_of(good):
    """Kinds of tensors that no exchange takes."""
    return [
        None,
        3,
        [1.0],
        good.to("meta"),
        good.to_sparse(),
        good.flatten(),
        good[0, 0],
        good.to(torch.complex64),
    ]


def _high_throughput(exchange):
    came = exchange.dispatch(X, IDS, W, EXPERTS)
    rows, handle = came.x, came.handle
    for wrong in wrongs_of(X):
        yield lambda wrong=wrong: exchange.dispatch(wrong, IDS, W, EXPERTS)
        yield lambda wrong=wrong: exchange.combine(wrong, handle)
        yield lambda wrong=wrong: exchange.combine(rows, handle, None, (X, wrong))
        yield lambda wrong=wrong: exchange.dispatch((X.to(torch.float8_e4m3fn), wrong), IDS, W, EXPERTS)
    for wrong in wrongs_of(IDS):
        yield lambda wrong=wrong: exchange.dispatch(X, wrong, W, EXPERTS)
    for wrong in wrongs_of(W)[1:]:
        yield lambda wrong=wrong: exchange.dispatch(X, IDS, wrong, EXPERTS)
        yield lambda wrong=wrong: exchange.combine(rows, handle, wrong)
    yield lambda: exchange.combine(rows, handle, None, 3)
    yield lambda: exchange.dispatch((X, X, X), IDS, W, EXPERTS)
    yield lambda: exchange.dispatch(X, IDS, W, 1 << 40)
    yield lambda: exchange.dispatch(X, IDS, W, EXPERTS, num_worst_tokens=1 << 40)
    yield lambda: exchange.combine(rows, tuple(handle))


def _one_sided(exchange):
    for wrong in wrongs_of(NARROW):
        yield lambda wrong=wrong: exchange.dispatch(wrong, [X], MOST)
    for wrong in (None, 3, X, "xy", [3], [X.to("meta")], [_nested(X)], [X.t()], [X[:1]], [X] * 9):
        yield lambda wrong=wrong: exchange.dispatch(NARROW, wrong, MOST)
    for wrong in ("8", 1 << 40, 2.0, True):
        yield lambda wrong=wrong: exchange.dispatch(NARROW, [X, NARROW], MOST, invalid_token_expert_id=wrong)
    exchange.dispatch(NARROW, [X], MOST)
    for wrong in (*wrongs_of(X), BACK.to("meta"), BACK.double(), BACK.transpose(1, 2)):
        yield lambda wrong=wrong: exchange.combine(wrong, MOST)
    for hidden, dtype in ((-1, torch.half), (None, torch.half), (2.5, torch.half), (8, None), (8, "half")):
        yield lambda hidden=hidden, dtype=dtype: exchange.combine_buffer(hidden, dtype)
    exchange.combine(BACK, MOST)


def _two_sided(exchange):
    for wrong in wrongs_of(NARROW):
        yield lambda wrong=wrong: exchange.prepare(wrong, W, MOST, EXPERTS)
    for wrong in wrongs_of(W):
        yield lambda wrong=wrong: exchange.prepare(NARROW, wrong, MOST, EXPERTS)
    for most, experts in ((1 << 40, EXPERTS), (2.0, EXPERTS), (MOST, 1 << 40), (MOST, None)):
        yield lambda most=most, experts=experts: exchange.prepare(NARROW, W, most, experts)
    info = exchange.prepare(NARROW, W, MOST, EXPERTS)[0]
    for wrong in (None, 3, (), X):
        yield lambda wrong=wrong: exchange.alltoallv(X, wrong)
        yield lambda wrong=wrong: exchange.combine(X, wrong, TOP_K)
    for wrong in (None, 3, X.to("meta"), X.to_sparse(), _nested(X), X[:1], X[0, 0]):
        yield lambda wrong=wrong: exchange.alltoallv(wrong, info)
        yield lambda wrong=wrong: exchange.combine(wrong, info, TOP_K)
    for wrong in (3.0, None, True, 0):
        yield lambda wrong=wrong: exchange.combine(torch.ones(2 * MOST, HIDDEN), info, wrong)


def _make_mistakes(member):
    """Rank 1 makes them, while rank 0 waits in the next call."""
    counts = {}
    makers = {"high_throughput": _high_throughput, "one_sided": _one_sided, "two_sided": _two_sided}
    for name, exchange in open_all(member, "cpu").items():
        words = exchange.workspace.arena.channel.words
        counts[name] = 0
        for call in makers[name](exchange):
            if member.rank == 1:
                epoch, number = words[Word.EPOCH], counts[name]
                with pytest.raises(ConfigError):
                    call()
                assert words[Word.EPOCH] == epoch, number
            counts[name] += 1
        out = there_and_back(name, exchange, [X], IDS, W, lambda rows: rows[0].clone())[3]
        assert out.shape == X.shape
        exchange.close()
    return counts


def test_a_mistake_takes_no_call_and_does_no_harm(on_ranks):
    first, second = on_ranks(2, _make_mistakes)
    assert first == second
    assert min(first.values()) > 25

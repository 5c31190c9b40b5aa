import pytest
import torch

from tests.faults.worlds import KINDS, failure_of, group, reduce_ones

LIMIT_SECONDS = 1.0


def _rows(comm, count):
    return torch.full((count, 2), float(comm.rank))


def _exchange(comm, kind, sends, recvs, **kwargs):
    x = torch.cat([torch.full((n, 2), 10.0 * comm.rank + dst) for dst, n in enumerate(sends)])
    out = comm.all_to_all_single(x, sends, recvs, algorithm=KINDS[kind], **kwargs)
    expected = [torch.full((n, 2), 10.0 * src + comm.rank) for src, n in enumerate(recvs)]
    assert torch.equal(out, torch.cat(expected))


SENDS = {2: [[1, 4], [2, 3]], 3: [[1, 4, 0], [2, 3, 1], [5, 0, 2]]}
RECVS = {n: [list(column) for column in zip(*sends, strict=True)] for n, sends in SENDS.items()}


def _unequal(member, kind, wrong):
    with group(member, kind) as comm:
        sends, recvs = SENDS[member.world_size][member.rank], list(RECVS[member.world_size][member.rank])
        _exchange(comm, kind, sends, recvs)
        for rank, src, rows in wrong:
            if rank == member.rank:
                recvs[src] = rows
        failure = failure_of(comm.all_to_all_single, _rows(comm, sum(sends)), sends, recvs)
        _exchange(comm, kind, sends, RECVS[member.world_size][member.rank])
        reduce_ones(comm, kind)
        return failure


@pytest.mark.parametrize("kind", KINDS)
def test_f11_unequal_splits_name_the_pair_on_every_rank(world, kind):
    for failure in world(2, _unequal, kind, [(1, 0, 3)]):
        assert failure.kind == "CollectiveMismatchError", failure
        assert "rank 0 sends 4 rows to rank 1, which expects 3" in failure.text
        assert failure.text.count(" sends ") == 1
        assert failure.op == "all_to_all_single"
        assert failure.seconds < LIMIT_SECONDS


def test_f11_a_rank_that_is_not_part_of_the_pair_is_told_too(world):
    failures = world(3, _unequal, "torch", [(1, 2, 7), (0, 0, 2)])
    for rank, failure in enumerate(failures):
        assert failure.kind == "CollectiveMismatchError", failure
        assert "rank 2 sends 0 rows to rank 1, which expects 7" in failure.text
        assert "rank 0 sends 1 rows to rank 0, which expects 2" in failure.text
        assert failure.text.count(" sends ") == 2
        assert failure.rank == rank


def test_f11_the_error_has_its_call_number_and_the_ranks_at_fault(world):
    failures = world(3, _unequal, "torch", [(1, 0, 3)])
    assert [failure.peers for failure in failures] == [(0, 1)] * 3
    assert {failure.seq for failure in failures} != {-1}


WRONG_SPLITS = {
    "too few rows": ([1, 1], [1, 1], "adds up to 2; the tensor has 5 rows"),
    "too many rows": ([4, 4], [1, 1], "adds up to 8; the tensor has 5 rows"),
    "negative": ([-1, 6], [1, 1], "has a negative entry"),
    "negative to receive": ([1, 4], [-1, 1], "has a negative entry"),
    "too short": ([5], [1, 1], "has 1 entries; needed one for each of 2 ranks"),
    "too long": ([1, 4], [1, 1, 1], "has 3 entries; needed one for each of 2 ranks"),
    "indivisible": (None, None, "5 rows do not divide among 2 ranks"),
}


def _wrong_then_right(member, kind):
    sends, recvs = SENDS[2][member.rank], RECVS[2][member.rank]
    failures = {}
    with group(member, kind) as comm:
        for name, (wrong_sends, wrong_recvs, _) in WRONG_SPLITS.items():
            if member.rank == 0:
                failures[name] = failure_of(comm.all_to_all_single, _rows(comm, 5), wrong_sends, wrong_recvs)
            _exchange(comm, kind, sends, recvs)
        reduce_ones(comm, kind)
    return failures


@pytest.mark.parametrize("kind", ["cpu", "torch", "remote"])
def test_f12_wrong_splits_are_refused_and_the_right_call_can_follow(world, kind):
    failures, _ = world(2, _wrong_then_right, kind)
    for name, (_, _, told) in WRONG_SPLITS.items():
        assert failures[name].kind == "ConfigError", failures[name]
        assert told in failures[name].text
        assert failures[name].seconds < 0.2


def _wrong_then(member, follows, signals):
    with group(member, "torch") as comm:
        reduce_ones(comm, "torch")
        if member.rank == 0:
            refused = failure_of(comm.all_to_all_single, _rows(comm, 5), [1, 1], [1, 1])
            assert refused.kind == "ConfigError"
            if follows:
                failure = failure_of(reduce_ones, comm, "torch")
                reduce_ones(comm, "torch")
                return failure
            signals.wait_for("failed")
            return None
        failure = failure_of(_exchange, comm, "torch", SENDS[2][1], RECVS[2][1], timeout=1.0)
        signals.show("failed")
        if follows:
            reduce_ones(comm, "torch")
        return failure


def test_f12_a_peer_that_made_the_right_call_is_told_at_the_callers_next(world, signals):
    for failure in world(2, _wrong_then, True, signals):
        assert failure.kind == "CollectiveMismatchError", failure
        assert "rank 0: all_reduce" in failure.text
        assert "rank 1: all_to_all_single" in failure.text
        assert failure.seconds < LIMIT_SECONDS


def test_f12_a_peer_that_made_the_right_call_is_told_at_its_deadline(world, signals):
    _, failure = world(2, _wrong_then, False, signals)
    assert (failure.kind, failure.peers) == ("PeerTimeoutError", (0,))
    assert 0.9 < failure.seconds < 2.0

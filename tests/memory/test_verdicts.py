import os

import pytest

from tcomm.memory.control import Word
from tcomm.memory.verdicts import Verdicts


def _decide(member, directory):
    """Both propose at once, again and again; then what is left, and who removes it."""
    arena = member.arena(64 << 10)
    verdicts = Verdicts(arena.channel, directory)
    told = []
    for epoch in range(20):
        assert verdicts.find(epoch, 7) is None
        member.meet("ready")
        told.append(verdicts.propose(f"of rank {member.rank}", epoch))
    assert [verdicts.find(epoch) for epoch in range(20)] == told
    assert (verdicts.exists(3), verdicts.exists(3, 1)) == (True, False)
    member.meet("all have read")
    names = [sorted(os.listdir(directory))]
    member.meet("listed")
    verdicts.drop(18)
    member.meet("dropped")
    names.append(sorted(os.listdir(directory)))
    member.meet("listed again")
    arena.channel.words[Word.EPOCH] = 18
    member.meet("one is behind")
    if member.rank == 0:
        # Rank 1 is alive and has completed call 18, but not 19.
        verdicts.close([1])
        names.append(sorted(os.listdir(directory)))
        arena.close("it is done")
    member.meet("one has left")
    if member.rank == 1:
        verdicts.close([0])
        names.append(sorted(os.listdir(directory)))
    return told, names, verdicts.prefix


def test_the_first_proposal_counts_and_the_last_rank_removes_what_is_left(on_ranks, tmp_path):
    (told, names, prefix), (told_too, names_too, prefix_too) = on_ranks(2, _decide, str(tmp_path))
    assert told == told_too
    assert set(told) <= {"of rank 0", "of rank 1"}
    assert prefix == prefix_too
    assert names[:2] == names_too[:2]
    name = os.path.basename(prefix)
    assert names[0] == sorted(f"{name}-{epoch}-0" for epoch in range(20))
    assert names[1] == [f"{name}-18-0", f"{name}-19-0"]
    assert names[2] == [f"{name}-19-0"]
    assert names_too[2] == []


def _removed_too_early(member, directory):
    verdicts = Verdicts(member.arena(64 << 10).channel, directory)
    os.symlink("somebody's", f"{verdicts.prefix}-4-0")
    assert verdicts.propose("mine", 4) == "somebody's"
    verdicts.find = lambda epoch, number: None
    with pytest.raises(AssertionError, match="removed before"):
        verdicts.propose("mine", 4)


def test_a_verdict_that_is_gone_is_no_verdict(on_ranks, tmp_path):
    on_ranks(1, _removed_too_early, str(tmp_path))

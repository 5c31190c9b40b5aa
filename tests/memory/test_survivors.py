import os
import time

import pytest

from tcomm.errors import CollectiveMismatchError, ConfigError, PeerTimeoutError
from tcomm.memory.control import FAULTS, Word
from tcomm.memory.survivors import Survivors
from tcomm.signature import CallDescription

CALL, OTHER = CallDescription("step"), CallDescription("other")


def step(arena, survivors, seconds=10.0, call=CALL):
    survivors.refuse_if_masked()
    epoch = arena.channel.begin(call, seconds)
    word = epoch << 32 | call.signature
    survivors.publish(word)
    survivors.await_peers(word, seconds)
    arena.channel.finish(epoch)


def _make(member, directory):
    arena = member.arena(64 << 10)
    survivors = Survivors(arena.channel, directory)
    survivors.masks_late = True
    return arena, survivors


def _verdict_of_another(member, directory):
    """Rank 0 finds a proposal that somebody else made first: to wait for nobody but rank 2."""
    arena, survivors = _make(member, directory)
    step(arena, survivors)
    member.meet("begun")
    if member.rank == 2:
        time.sleep(0.8)
        step(arena, survivors)
        step(arena, survivors)
    else:
        os.makedirs(directory, exist_ok=True)
        if member.rank == 0:
            # Nobody is masked in round 0; in round 1 rank 2 is still late, but not by much.
            os.symlink("0.0", f"{survivors._prefix}-2-0")
        member_seconds = 0.3 if member.rank == 0 else 10.0
        step(arena, survivors, member_seconds)
        with pytest.raises(OSError, match="No such file"):
            os.readlink(f"{survivors._prefix}-1-0")
    return sorted(survivors.masked), survivors.faults, survivors.is_needed


def test_the_first_proposal_of_a_round_is_the_verdict(on_ranks, tmp_path):
    outcomes = on_ranks(3, _verdict_of_another, str(tmp_path), check=False)
    assert [o.value for o in outcomes[:2]] == [([2], [(2, (2,))], True)] * 2
    assert "the others of group 'arena' have gone on without this rank, 2, since call #2" in outcomes[2].error


def _by_hand(member, directory):
    arena, survivors = _make(member, directory)
    survivors.masks_late = False
    told = [survivors.is_needed, survivors.active]
    for wrong in (member.rank, 2, -1):
        with pytest.raises(ConfigError, match="give another rank, 0 to 1"):
            survivors.set_masked(wrong, True)
    peer = 1 - member.rank
    survivors.set_masked(peer, True)
    told += [survivors.is_needed, survivors.active]
    for _ in range(member.rank + 1):
        step(arena, survivors)
    member.meet("alone")
    with pytest.raises(ConfigError, match=f"rank {peer} has completed call #{peer + 1} and this rank"):
        survivors.set_masked(peer, False)
    arena.channel.pages[peer].words[Word.MASKED] = 8
    arena.channel.words[FAULTS + 1] = 77
    member.meet("told")
    with pytest.raises(PeerTimeoutError, match="since call #7") as caught:
        step(arena, survivors)
    told.append(caught.value.peers)
    member.meet("refused")
    arena.set_epoch(10)
    survivors.forget()
    member.meet("forgotten")
    told += [arena.channel.words[FAULTS + 1], survivors.active == [peer]]
    step(arena, survivors)
    survivors.masks_late = True
    with pytest.raises(CollectiveMismatchError):
        step(arena, survivors, call=CALL if member.rank else OTHER)
    step(arena, survivors)
    return told, arena.channel.words[Word.EPOCH]


def test_masks_by_hand(on_ranks, tmp_path):
    for rank, (told, epoch) in enumerate(on_ranks(2, _by_hand, str(tmp_path))):
        assert told == [False, [1 - rank], True, [], (rank,), 0, True]
        assert epoch == 13


def _leaves(member, directory):
    arena, survivors = _make(member, directory)
    step(arena, survivors)
    if member.rank == 2:
        os._exit(0)
    step(arena, survivors)
    left = os.listdir(directory)
    member.world_size = 2
    member.meet("both have completed it")
    survivors.close()
    member.meet("closed")
    return left, os.listdir(directory)


def test_a_verdict_is_removed_once_all_have_completed_the_call(on_ranks, tmp_path):
    outcomes = on_ranks(3, _leaves, str(tmp_path), check=False)
    for outcome in outcomes[:2]:
        left, after = outcome.value
        assert len(left) == 1
        assert left[0].endswith("-2-0")
        assert after == []

import os
import time
import types

import pytest

from tcomm.errors import CollectiveMismatchError, ConfigError, PeerLostError, PeerTimeoutError
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
    member.meet("looked")
    for wrong in (member.rank, 2, -1, 1.0, "1", None):
        with pytest.raises(ConfigError, match="give another rank, 0 to 1"):
            survivors.set_masked(wrong, True)
    peer = 1 - member.rank
    survivors.set_masked(peer, True)
    told += [survivors.is_needed, survivors.active]
    for _ in range(member.rank + 1):
        step(arena, survivors)
    member.meet("alone")
    assert [survivors.epoch_of(rank) for rank in range(2)] == [1, 2]
    # Two that leave each other out both go on; one that counts on the other does not.
    survivors.refuse_if_left_out()
    member.meet("both go on")
    if member.rank == 1:
        arena.channel.words[Word.LEFT_OUT] = 0
        with pytest.raises(PeerTimeoutError, match="since call #3, for which it was late"):
            survivors.refuse_if_left_out()
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
    survivors.refuse_if_left_out()
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


def _beside_kernels(member, directory):
    kernels, told = types.SimpleNamespace(epoch_of=lambda rank: 7 * rank), []
    kernels.leave_out = told.append
    survivors = Survivors(member.arena(64 << 10).channel, directory, kernels)
    peer = 1 - member.rank
    survivors.set_masked(peer, True)
    with pytest.raises(ConfigError, match=f"rank {peer} has completed call #{7 * peer} and this rank"):
        survivors.set_masked(peer, False)
    survivors.forget()
    return told


def test_kernels_that_work_by_other_pages_are_told_whom_to_leave_out(on_ranks, tmp_path):
    assert on_ranks(2, _beside_kernels, str(tmp_path)) == [[0b10, 0], [0b01, 0]]


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


def _finds_no_verdict_any_more(member, directory):
    """Rank 1 stops before it looks for a verdict, by which the others have gone on and which they removed."""
    arena, survivors = _make(member, directory)
    step(arena, survivors)
    if member.rank == 0:
        member.meet("over")
        return arena.channel.words[Word.MASKED]
    os.makedirs(directory, exist_ok=True)
    find = survivors._verdicts.find

    def too_late(*question):
        arena.channel.words[Word.MASKED] = 3
        return find(*question)

    survivors._verdicts.find = too_late
    with pytest.raises(PeerTimeoutError, match="without this rank, 1, since call #2"):
        step(arena, survivors, 0.1)
    member.meet("over")
    return sorted(survivors.masked)


def test_a_verdict_made_anew_is_nobodys(on_ranks, tmp_path):
    assert on_ranks(2, _finds_no_verdict_any_more, str(tmp_path)) == [0, []]


def _late_for_anothers_sake(member, directory):
    """Rank 2 tells rank 0 alone of call 2; rank 1 waits for it there for longer than rank 0 in call 3."""
    arena, survivors = _make(member, directory)
    step(arena, survivors)
    if member.rank == 2:
        page = arena.channel.pages[1]
        survivors.masked.add(1)
        survivors.publish(2 << 32 | CALL.signature)
        member.meet("over")
        with pytest.raises(PeerTimeoutError, match="since call #3") as caught:
            step(arena, survivors)
        return caught.value.peers, page.words[Word.WAITING_FOR]
    step(arena, survivors, 0.75)
    step(arena, survivors, 0.5 if member.rank == 0 else 10.0)
    step(arena, survivors)
    member.meet("over")
    return survivors.faults, survivors.masked


def test_who_waits_for_a_late_rank_is_not_late(on_ranks, tmp_path):
    outcomes = on_ranks(3, _late_for_anothers_sake, str(tmp_path))
    assert outcomes == [([(3, (2,))], {2})] * 2 + [((2,), 0)]


def _stops_while_it_waits(member, directory):
    arena, survivors = _make(member, directory)
    step(arena, survivors)
    began = time.monotonic()
    if member.rank == 1:
        arena.channel.words[Word.SEQ] = 1
        arena.channel.words[Word.WAITING_FOR] = 1
    member.meet("stopped")
    if member.rank == 0:
        step(arena, survivors, 0.2)
    seconds = time.monotonic() - began
    member.meet("over")
    return survivors.faults, seconds


def test_nobody_is_waited_for_for_ever(on_ranks, tmp_path):
    (faults, seconds), _ = on_ranks(2, _stops_while_it_waits, str(tmp_path))
    assert faults == [(2, (1,))]
    assert 0.6 <= seconds < 8


def _opener_is_ahead(member, directory):
    """Rank 1 has been in a round of call 1, and opened one of call 2 before rank 0 looks."""
    arena, survivors = _make(member, directory)
    if member.rank == 0:
        os.makedirs(directory, exist_ok=True)
        os.symlink("4.0", f"{survivors._prefix}-1-0")
        arena.channel.words[FAULTS + 1] = 2 << 8 | 1
    member.meet("opened")
    if member.rank < 2:
        step(arena, survivors)
    else:
        survivors.publish(1 << 32 | CALL.signature)
    member.meet("over")
    return survivors.faults, arena.channel.words[Word.MASKED]


def test_a_round_counts_when_its_opener_is_in_the_next_call(on_ranks, tmp_path):
    first, second, third = on_ranks(3, _opener_is_ahead, str(tmp_path))
    assert first == ([(1, (2,))], 0)
    assert second == ([], 0)
    assert third == ([], 2)


def _another_call_told_to_one(member, directory):
    arena, survivors = _make(member, directory)
    if member.rank == 2:
        survivors.masked.add(1)
        arena.channel.begin(OTHER, 1.0)
        survivors.publish(1 << 32 | OTHER.signature)
        member.meet("over")
        return "", 0
    with pytest.raises(CollectiveMismatchError) as caught:
        step(arena, survivors, 0.3)
    member.meet("over")
    return str(caught.value), arena.channel.words[Word.EPOCH]


def test_all_hear_of_another_call_that_was_told_to_one(on_ranks, tmp_path):
    for told, epoch in on_ranks(3, _another_call_told_to_one, str(tmp_path))[:2]:
        assert "rank 2: other" in told
        assert epoch == 1


def _breaks_off(member, directory):
    arena, survivors = _make(member, directory)
    step(arena, survivors)
    if member.rank == 1:
        arena.channel.interrupt()
        with pytest.raises(PeerLostError, match="rank 1 was interrupted in the middle of it"):
            step(arena, survivors)
        code_of_the_other = arena.channel.pages[0].words[Word.POISON_CODE]
    member.meet("interrupted")
    if member.rank == 1:
        return code_of_the_other, survivors.masks_late
    step(arena, survivors)
    survivors.masks_late = False
    # Whom the others have gone on without leaves them alone, whatever it was set to.
    arena.channel.words[Word.MASKED] = 7
    arena.channel.interrupt()
    return survivors.faults, arena.channel.blame(1), arena.channel.pages[1].words[Word.POISON_SEQ]


def test_who_is_interrupted_leaves_alone(on_ranks, tmp_path):
    (faults, told, seq), second = on_ranks(2, _breaks_off, str(tmp_path))
    assert faults == [(2, (1,))]
    assert told == "rank 1 left: it was interrupted in the middle of call #2"
    assert (seq, second) == (2, (0, True))


def _left_out_by_hand(member, directory):
    """Rank 2 is masked by hand, and makes the same calls: it harms nobody, whatever becomes of late ranks."""
    arena, survivors = _make(member, directory)
    found = [survivors.is_needed]
    for masks_late in (True, False):
        survivors.masks_late = masks_late
        if member.rank < 2:
            survivors.set_masked(2, True)
        member.meet("masked")
        found.append(survivors.is_needed)
        if member.rank == 2:
            with pytest.raises(PeerTimeoutError, match="have gone on without this rank, 2"):
                step(arena, survivors, 0.2 if masks_late else None)
            member.meet("rank 2 has given up")
        else:
            # As if rank 2 had opened a round.
            arena.channel.words[FAULTS + 2] = arena.channel.words[Word.EPOCH] + 1 << 8 | 1
            member.meet("rank 2 has given up")
            with pytest.raises(ConfigError, match="and raised in the next: it cannot just go on"):
                survivors.set_masked(2, False)
            step(arena, survivors)
        member.meet("over")
        arena.set_epoch(10)
        survivors.forget()
        member.meet("forgotten")
    return found, survivors.faults, arena.channel.words[Word.POISON_CODE], survivors.is_needed


def test_who_is_left_out_has_no_say(on_ranks, tmp_path):
    assert on_ranks(3, _left_out_by_hand, str(tmp_path)) == [([True] * 3, [], 0, False)] * 3

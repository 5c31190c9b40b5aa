import time

import pytest
import torch.distributed as dist

from tcomm.eplb.moving.meeting import Meeting, Trouble
from tcomm.errors import CommError, ConfigError, PeerLostError, PeerTimeoutError
from tcomm.groups.setup import Membership
from tcomm.memory.exchange import StoreExchange

LATE, LOST = (kind("it is", peers=[peer]) for kind, peer in ((PeerTimeoutError, 1), (PeerLostError, 2)))


@pytest.fixture
def meetings(monkeypatch):
    """Three ranks in one process, in their first call."""
    monkeypatch.setattr("tcomm.eplb.moving.meeting._SECONDS_TO_TELL", 0.05)
    store = dist.HashStore()
    made = []
    for rank in range(3):
        members = Membership("ep", StoreExchange(store, rank, 3, "g"), None, (0, 1, 2))
        made.append(Meeting(members))
        made[-1].begin()
    return made


def soon():
    return time.monotonic() + 0.05


def _told(call, *args):
    with pytest.raises(CommError) as caught:
        call(*args)
    return type(caught.value), caught.value.peers


def test_all_get_what_all_gave_and_who_is_missing_is_named(meetings):
    first, second, third = meetings
    assert _told(first.gather, "before", b"\xff1", soon()) == (PeerTimeoutError, (1, 2))
    assert _told(third.gather, "before", b"3", soon()) == (PeerTimeoutError, (1,))
    assert second.gather("before", b"", soon()) == [b"\xff1", b"", b"3"]
    assert third.gather("before", b"3", None) == [b"\xff1", b"", b"3"]


def test_commit_first_means_commit_for_all(meetings):
    first, second, third = meetings
    first.commit()
    assert second.give_up(LATE) is False
    third.commit()
    third.refuse_verdict()


def test_of_the_words_on_what_was_prepared_the_first_counts(meetings):
    first, second, third = meetings
    for words, settled in (((False, True, True), False), ((True, False, False), True)):
        for meeting in meetings:
            meeting.commit()
        assert [each.settle(word) for each, word in zip((third, first, second), words, strict=True)] == [
            settled
        ] * 3
        for meeting in meetings:
            meeting.begin()


def test_giving_up_first_means_that_for_all_and_names_whom(meetings):
    first, second, third = meetings
    first.refuse_verdict()
    assert first.give_up(LOST) is True
    for call in (second.commit, second.refuse_verdict, lambda: second.give_up(LATE)):
        assert _told(call) == (PeerLostError, (2,))
    assert _told(third.gather, "after", b"", None) == (PeerLostError, (2,))
    assert first.rank == 0
    with pytest.raises(
        PeerLostError, match=r"call #0: given up for the sake of ranks \[2\]: it is"
    ) as caught:
        second.commit()
    assert (caught.value.group, caught.value.op, caught.value.seq) == ("ep", "move_experts", 0)


def test_who_is_stuck_for_anothers_sake_is_not_to_blame(meetings):
    first, second, third = meetings
    # Rank 1 has found rank 2 dead, and has not proposed yet.
    second._store.set(second._key("stuck/1"), '{"is_late": false, "peers": [2], "told": "dead"}')
    assert first.give_up(LATE) is True
    assert _told(third.commit) == (PeerLostError, (2,))


def test_two_that_wait_for_each_other_are_named_as_they_said(meetings):
    first, second, third = meetings
    second._store.set(second._key("stuck/1"), '{"is_late": true, "peers": [0], "told": "stuck"}')
    assert first.give_up(LATE) is True
    assert _told(third.commit) == (PeerTimeoutError, (1,))


def test_a_failure_of_its_own_names_the_rank_itself(meetings):
    first, second, _ = meetings
    trouble = Trouble.of(ConfigError("no"), 1)
    assert trouble == Trouble(False, (1,), "rank 1 failed: ConfigError: no")
    assert second.give_up(ConfigError("no")) is True
    assert _told(first.commit) == (PeerLostError, (1,))


def test_calls_leave_two_rounds_of_keys(meetings):
    counts = []
    for _ in range(6):
        for meeting in meetings:
            meeting.begin()
            meeting._store.set(meeting._key(f"before/{meeting.rank}"), "")
            meeting.commit()
            meeting.settle(True)
        counts.append(meetings[0]._store.num_keys())
    assert counts[2:] == [10] * 4


def test_a_store_that_is_gone_is_an_error_of_its_own(meetings):
    class Gone:
        def check(self, keys):
            raise dist.DistNetworkError("connection reset")

    meetings[0]._store = Gone()
    with pytest.raises(
        PeerLostError, match="store is gone, and the verdict with it: connection reset"
    ) as caught:
        meetings[0].refuse_verdict()
    assert caught.value.peers == ()

import pytest
from torch.distributed import HashStore

from tcomm.errors import ConfigError, GroupMismatchError, RendezvousError
from tcomm.groups.moe.elastic_members import ElasticMembers, Facts
from tests.groups.all2all.worlds import told

FACTS = Facts(4, 16)


def _come_and_go(member):
    """Two ranks, then three, then two, then three again: the last one joins, goes and joins anew."""
    members = ElasticMembers(member.store, member.rank, 20.0)
    found = [members.num_ranks]
    for size in (2, 3, 2, 3):
        if member.rank < size:
            group, facts = members.meet(size, FACTS if member.rank == 0 else None)
            found.append((group.name.rpartition("/")[0], members.num_ranks, facts))
        else:
            members.leave()
    return found


def test_ranks_that_stay_and_ranks_that_join_meet(on_ranks):
    first, second, third = on_ranks(3, _come_and_go)
    assert first == second == [0, *((f"elastic/{n}", size, FACTS) for n, size in enumerate((2, 3, 2, 3), 1))]
    assert third == [0, ("elastic/2", 3, FACTS), ("elastic/4", 3, FACTS)]


def _disagree(member):
    members = ElasticMembers(member.store, member.rank, 20.0 if member.rank else 0.5)
    numbers = told(members.meet, 2 + member.rank, None)
    again = told(ElasticMembers(member.store, member.rank, 0.5).meet, 2, None) if member.rank else None
    members = ElasticMembers(HashStore(), 0, 0.2)
    late = told(members.meet, 2, None)
    return numbers, again, late


def test_ranks_that_want_different_things_are_told(on_ranks):
    (first, _, late), (second, again, _) = on_ranks(2, _disagree, timeout=60)
    assert second[1] == "rank 1 is to be one of 3 ranks, and rank 0 calls 2"
    assert GroupMismatchError.__name__ in second[0]
    assert RendezvousError.__name__ in first[0]
    assert "rank 1 was not called within 0.5 s" in again[1]
    assert "ranks [1] of 2 did not come" in late[1]


def test_a_call_to_a_meeting_that_failed_is_called_off():
    store = HashStore()
    with pytest.raises(RendezvousError, match=r"ranks \[1\] of 2"):
        ElasticMembers(store, 0, 0.1).meet(2, None)
    with pytest.raises(RendezvousError, match=r"rank 1 was not called within 0.1 s"):
        ElasticMembers(store, 1, 0.1).meet(2, None)


def _other_facts(member):
    members = ElasticMembers(member.store, member.rank, 20.0)
    return told(members.meet, 2, Facts(4, 16 + member.rank))


def test_ranks_that_exchange_different_tokens_are_told(on_ranks):
    for kinds, text in on_ranks(2, _other_facts):
        assert GroupMismatchError.__name__ in kinds
        assert "Facts(max_tokens=4, hidden=16)" in text
        assert "Facts(max_tokens=4, hidden=17)" in text


def test_who_is_not_to_be_there_does_not_meet():
    with pytest.raises(ConfigError, match="rank 2 is not among 2 ranks"):
        ElasticMembers(HashStore(), 2, 1.0).meet(2, None)

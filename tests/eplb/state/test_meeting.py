import numpy as np
import pytest
import torch

from tcomm.eplb.state.meeting import UNKNOWN, Errand, Meeting, Visit, checked_group, fingerprint
from tcomm.errors import CollectiveMismatchError, ConfigError
from tests.eplb.state.toy import expert_group, lone_group


def test_visits_agree_as_far_as_both_know():
    visit = Visit(Errand.PLAN, 3, 1, 7, 1)
    assert visit.agrees(visit._replace(host=2))
    assert visit.agrees(Visit(Errand.PLAN, UNKNOWN, UNKNOWN, 7, 5))
    for other in ({"errand": Errand.MOVE}, {"step": 4}, {"num_models": 2}, {"facts": 8}):
        assert not visit.agrees(visit._replace(**other))


def test_a_fingerprint_is_of_numbers_in_their_order():
    a, b = np.array([[1, 2]]), np.array([[2, 1]])
    assert fingerprint(a, b) == fingerprint(a.astype(np.int32), b)
    assert len({fingerprint(a, b), fingerprint(b, a), fingerprint(a), 0}) == 4


def test_alone_everybody_agrees():
    with lone_group() as group:
        meeting = Meeting(group)
        values = torch.tensor([1, 2])
        [visit] = meeting.agree(Errand.SHARE, 5, 2, 9)
        assert visit[:4] == (Errand.SHARE, 5, 2, 9)
        assert meeting.total(values).tolist() == [1, 2]
        assert meeting.total(values) is not values
        assert meeting.hand_out(values, 0).tolist() == [1, 2]
        group.destroy()
        with pytest.raises(ConfigError, match=r"Group ep:\d+ is destroyed\."):
            meeting.agree(Errand.SHARE, 5, 2, 9)


def test_only_a_coordinator_will_do():
    with pytest.raises(ConfigError, match="None is no GroupCoordinator; give the expert parallel group"):
        Meeting(None)
    with pytest.raises(ConfigError, match="3 is no GroupCoordinator"):
        checked_group(3)
    with lone_group() as group:
        assert checked_group(group) is group


def _meets(member):
    with expert_group(member) as group:
        meeting = Meeting(group)
        rank = member.rank
        seen = []
        for errand, step, models, facts in [
            (Errand.LOADS, 7 + (rank == 2), 1, 0),
            (Errand.LOADS if rank else Errand.STATISTICS, 7, 1, 0),
            (Errand.PLAN, UNKNOWN if rank == 0 else 7, 1, 0xAB + (rank == 0)),
        ]:
            with pytest.raises(CollectiveMismatchError) as caught:
                meeting.agree(errand, step, models, facts)
            seen.append((caught.value.peers, caught.value.seq, str(caught.value)))
        joining = rank == 0
        told = meeting.agree(Errand.SHARE, UNKNOWN if joining else 4, UNKNOWN if joining else 2, 3)
        values = torch.tensor([rank, 10 * rank])
        total = meeting.total(values)
        kept = values.tolist()
        handed = meeting.hand_out(values, 1).tolist()
        return seen, [visit[1:4] for visit in told], total.tolist(), kept, handed


def test_ranks_that_differ_are_named_and_can_go_on(on_ranks):
    results = on_ranks(3, _meets)
    for rank, (seen, told, total, values, handed) in enumerate(results):
        peers, step, text = seen[0]
        assert peers == ((0, 1) if rank == 2 else (2,))
        assert step == 7 + (rank == 2)
        assert "rank 1: step 7, loads, 1 models, facts 00000000\n  rank 2: step 8, loads" in text
        assert text.endswith("by the same loads, maps and settings")
        assert seen[1][0] == ((0,) if rank else (1, 2))
        assert "rank 0: step 7, statistics" in seen[1][2]
        assert seen[2][0] == ((0,) if rank else (1, 2))
        assert "rank 0: joins, plan, 1 models, facts 000000ac" in seen[2][2]
        assert told == [(UNKNOWN, UNKNOWN, 3), (4, 2, 3), (4, 2, 3)]
        assert total == [3, 30]
        assert values == [rank, 10 * rank]
        assert handed == [1, 10]

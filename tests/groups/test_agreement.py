import pytest
import torch.distributed as dist

from tcomm.errors import CapabilityError, CollectiveMismatchError
from tcomm.groups.agreement import LocalAgreement, RemoteAgreement, SharedAgreement
from tcomm.groups.fallback import TorchFallback
from tcomm.signature import CallDescription


def _agreement(member, kind):
    if kind == "shared":
        return SharedAgreement(member.arena(name="tp").channel)
    member.process_group()
    return RemoteAgreement("tp", TorchFallback("tp", dist.group.WORLD, None))


def _same_and_different(member, kind):
    agreement = _agreement(member, kind)
    same = CallDescription("all_to_all_single", "float32", (3,), send_splits=(member.rank, 2))
    calls = agreement.agree(same, 20.0)
    assert [call.send_splits for call in calls] == [(rank, 2) for rank in range(member.world_size)]
    mine = CallDescription("broadcast" if member.rank == 1 else "barrier")
    with pytest.raises(CollectiveMismatchError) as caught:
        agreement.agree(mine, 20.0)
    error = caught.value
    assert (error.group, error.op, error.rank) == ("tp", mine.op, member.rank)
    assert [call.op for call in agreement.agree(CallDescription("barrier"), 20.0)] == ["barrier"] * 3
    return str(error), error.peers


@pytest.mark.parametrize("kind", ["shared", "remote"])
def test_ranks_that_disagree_get_one_table_and_go_on(on_ranks, kind):
    told = on_ranks(3, _same_and_different, kind)
    for rank, (message, peers) in enumerate(told):
        lines = message.split("\n")
        assert lines[0] == "call #2 of group 'tp': the ranks called different things"
        assert lines[1:4] == ["  rank 0: barrier", "  rank 1: broadcast", "  rank 2: barrier"]
        assert lines[4] == "make the ranks call the same thing; the group stays usable"
        assert peers == ((0, 2) if rank == 1 else (1,))


def test_a_world_of_one_agrees_with_itself():
    call = CallDescription("barrier")
    assert LocalAgreement().agree(call, None) == [call]


def _longer_than_a_description(member, kind):
    """Sizes that no description holds: the signature stands for them. Splits that none holds: refused."""
    agreement = _agreement(member, kind)
    sizes = tuple(range(10**6, 10**6 + 400))
    call = CallDescription("all_to_all_single", "int8", sizes=sizes)
    assert len(agreement.agree(call, 20.0)) == member.world_size
    other = CallDescription("all_to_all_single", "int8", sizes=(*sizes[:-1], member.rank))
    with pytest.raises(CollectiveMismatchError):
        agreement.agree(other, 20.0)
    splits = sizes if member.rank == 1 else (1, 2)
    with pytest.raises(CapabilityError) as caught:
        agreement.agree(CallDescription("all_gatherv", send_splits=splits), 20.0)
    assert len(agreement.agree(CallDescription("barrier"), 20.0)) == member.world_size
    return str(caught.value)


@pytest.mark.parametrize("kind", ["shared", "remote"])
def test_what_no_description_holds_is_agreed_on_or_refused_by_all(on_ranks, kind):
    told = "all_gatherv: the splits of rank 1 are more than a description holds; use a smaller group"
    assert on_ranks(2, _longer_than_a_description, kind) == [told] * 2


def _long(member):
    agreement = _agreement(member, "remote")
    splits = tuple(range(10**6, 10**6 + 150))
    calls = agreement.agree(CallDescription("all_to_all_single", send_splits=splits), 20.0)
    return [call.send_splits == splits for call in calls]


def test_long_descriptions_pass_where_no_memory_is_shared(on_ranks):
    assert on_ranks(2, _long) == [[True, True]] * 2

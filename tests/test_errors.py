import pickle

import pytest

import tcomm
from tcomm import errors

TREE = {
    "TcommError": (Exception,),
    "ConfigError": (errors.TcommError, ValueError),
    "UsageError": (errors.ConfigError, AssertionError),
    "CapabilityError": (errors.TcommError,),
    "NotOfferedError": (errors.CapabilityError, NotImplementedError),
    "RendezvousError": (errors.TcommError,),
    "GroupMismatchError": (errors.RendezvousError,),
    "DuplicateRankError": (errors.RendezvousError,),
    "CommError": (errors.TcommError, RuntimeError),
    "PeerLostError": (errors.CommError,),
    "PeerTimeoutError": (errors.CommError, TimeoutError),
    "CollectiveMismatchError": (errors.CommError,),
    "GroupClosedError": (errors.CommError,),
    "QueueFullError": (errors.CommError,),
    "DecodeError": (errors.CommError,),
}


def test_the_tree_is_whole_and_public():
    assert set(TREE) == set(errors.__all__)
    assert set(TREE) <= set(tcomm.__all__)
    assert all(getattr(tcomm, name) is getattr(errors, name) for name in TREE)


@pytest.mark.parametrize("name", TREE)
def test_each_error_has_its_bases(name):
    assert getattr(errors, name).__bases__ == TREE[name]


@pytest.mark.parametrize("name", TREE)
def test_the_tree_is_drawn_in_the_docstring(name):
    assert name in errors.__doc__


def test_an_error_of_a_collective_carries_where_and_who():
    error = errors.PeerTimeoutError("late", group="tp", op="all_reduce", seq=7, rank=1, peers=[0, 2])
    assert str(error) == "late"
    assert (error.group, error.op, error.seq, error.rank, error.peers) == ("tp", "all_reduce", 7, 1, (0, 2))
    bare = errors.CommError("broken")
    assert (bare.group, bare.op, bare.seq, bare.rank, bare.peers) == ("", "", -1, -1, ())


@pytest.mark.parametrize("name", TREE)
def test_errors_travel_between_processes(name):
    kind = getattr(errors, name)
    fields = {"group": "tp", "op": "send", "seq": 3, "rank": 1, "peers": (0,)}
    error = kind("broken", **fields) if issubclass(kind, errors.CommError) else kind("broken")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (kind, "broken", vars(error))

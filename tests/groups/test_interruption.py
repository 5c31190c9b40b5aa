import pytest
import torch

from tcomm.errors import PeerLostError


def _interrupt(member):
    comm = member.communicator(timeout=10.0)
    comm.all_reduce(torch.ones(4))
    if member.rank == 1:
        comm.all_reduce = _interrupted_after_publishing(comm, member)
        with pytest.raises(KeyboardInterrupt):
            comm.all_reduce(torch.ones(4), "max")
    else:
        assert comm.all_reduce(torch.ones(4), "max").tolist() == [1.0] * 4
        member.meet("completed")
    member.meet("interrupted")
    with pytest.raises(PeerLostError, match="rank 1 was interrupted in the middle of it"):
        type(comm).all_reduce(comm, torch.ones(4))


def _interrupted_after_publishing(comm, member):
    channel = comm._arena.channel

    def publish(phase, word):
        type(channel).publish(channel, phase, word)
        member.meet("completed")
        raise KeyboardInterrupt

    def all_reduce(*args):
        channel.publish = publish
        return type(comm).all_reduce(comm, *args)

    return all_reduce


def test_an_interrupted_rank_is_never_out_of_step_without_a_word(on_ranks):
    on_ranks(2, _interrupt)

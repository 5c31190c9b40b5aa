import pytest
import torch


def _smoke(member):
    comm = member.communicator()
    x = torch.arange(10.0) + member.rank
    y = comm.all_reduce(x)
    z = comm.all_reduce(x, algorithm="triton")
    comm.close()
    assert torch.equal(y, z)
    return y.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_reduce_adds_up(on_ranks, world_size):
    expected = [world_size * i + sum(range(world_size)) for i in range(10)]
    assert on_ranks(world_size, _smoke) == [expected] * world_size

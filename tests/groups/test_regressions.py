"""Mistakes that a reviewer found, each of which gave wrong data or ended a group."""

import pytest
import torch

from tcomm.errors import CollectiveMismatchError, ConfigError
from tcomm.memory.control import Word


def _lists_cut_along_other_dims(member):
    comm = member.communicator()
    x, dim = torch.arange(16.0).view(4, 4), 0 if comm.rank else 1
    with pytest.raises(CollectiveMismatchError, match="along dims"):
        comm.reduce_scatterv([x], [2, 2], dim=dim)
    part = torch.arange(8.0).view((2, 4) if dim == 0 else (4, 2))
    with pytest.raises(CollectiveMismatchError, match="along dims"):
        comm.all_gatherv([part], [2, 2], dim=dim)
    assert comm.all_reduce(torch.ones(1)).item() == 2.0
    comm.close()


def test_lists_that_are_cut_along_other_dims_are_told_apart(on_ranks):
    on_ranks(2, _lists_cut_along_other_dims)


def _single_elements_of_any_stride(member):
    comm = member.communicator()
    x, out = (torch.arange(10.0)[start::5][:1] for start in (3, 0))
    if comm.rank == 0:
        comm.send(x, 1, algorithm="triton")
    else:
        assert comm.recv(out, 0, algorithm="triton").item() == 3.0
    comm.barrier()
    comm.close()


def test_a_single_element_of_any_stride_is_sent_by_a_kernel(on_ranks):
    on_ranks(2, _single_elements_of_any_stride)


def _block_on_its_own_results(member):
    comm = member.communicator()
    with pytest.raises(ConfigError, match="takes a result of this block"), comm.coalescing() as batch:
        batch.all_reduce(batch.all_reduce(torch.ones(4))[1:])
    out = torch.zeros(4)
    with comm.coalescing() as batch:
        batch.all_reduce(torch.ones(4), out=out)
        with pytest.raises(ConfigError, match="overlaps another result"):
            batch.all_reduce(torch.ones(2), out=out[1:3])
    assert out.eq(2).all()
    comm.barrier(async_op=True).wait(5.0)
    comm.close()


def test_a_block_refuses_views_of_its_own_results(on_ranks):
    on_ranks(2, _block_on_its_own_results)


def test_every_word_of_the_control_page_has_a_place_of_its_own():
    assert len(Word) == len(Word.__members__)

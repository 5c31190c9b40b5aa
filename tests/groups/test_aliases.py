"""The older names: the same calls, with torch.distributed's order of arguments and a warning."""

import warnings

import pytest
import torch

from tcomm.errors import ConfigError


def _older_names(member):
    comm, rank = member.communicator(), member.rank
    x = torch.arange(4.0) + 10 * rank
    total = (2 * torch.arange(4.0) + 10)[2 * rank : 2 * rank + 2]
    whole, part = torch.zeros(8), torch.zeros(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert comm.all_gather_into_tensor(whole, x) is whole
        assert comm.reduce_scatter_tensor(part, x, "max", timeout=5.0) is part
        assert comm.reduce_scatter_tensor(torch.zeros(2), x, async_op=True).wait().equal(total)
        with pytest.raises(ConfigError) as refused:
            comm.all_gather_into_tensor(x, whole)
    assert whole.equal(comm.all_gather_single(x))
    assert part.equal(comm.reduce_scatter_single(x, "max"))
    told = [(w.category, str(w.message), w.filename) for w in caught]
    comm.close()
    return told, str(refused.value)


def test_older_names_do_the_same_and_say_the_newer_one_where_they_are_called(on_ranks):
    gather = "all_gather_into_tensor(output, x) is the older name; call all_gather_single(x, out=output)"
    scatter = (
        "reduce_scatter_tensor(output, x, op) is the older name; call "
        "reduce_scatter_single(x, op, out=output)"
    )
    for told, refused in on_ranks(2, _older_names):
        assert told == [(DeprecationWarning, text, __file__) for text in (gather, scatter, scatter, gather)]
        assert refused == "out= of all_gather_single is float32 [4] on cpu; needed float32 [16] on cpu"

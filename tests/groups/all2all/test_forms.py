import pytest
import torch

from tcomm.errors import UsageError
from tcomm.groups.all2all.forms import copy_into, read_dispatch

HIDDEN, LOGITS, IDS, EXTRA = torch.ones(3, 4), torch.ones(3, 8), torch.zeros(3, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((LOGITS, None, False, None), (1, False, None)),
        ((LOGITS, True, False, None), (1, True, None)),
        ((LOGITS, False, True, None), (1, True, None)),
        ((LOGITS, True, [EXTRA], None), (1, True, 1)),
        ((LOGITS, True, None, None), (1, True, None)),
        ((LOGITS, False, (), None), (1, False, 0)),
        ((LOGITS, None, True, ()), (1, True, 0)),
        ((LOGITS, IDS, False, None), (2, False, None)),
        ((LOGITS, IDS, True, [EXTRA, EXTRA]), (2, True, 2)),
    ],
)
def test_both_orders_of_arguments_are_understood(given, wanted):
    read = read_dispatch(HIDDEN, *given)
    extras = None if read.extras is None else len(read.extras)
    assert (len(read.tensors) - 1, read.is_sequence_parallel, extras) == wanted
    assert read.tensors[0] is HIDDEN
    assert read.tensors[1] is LOGITS
    assert read.tensors[-1] is (IDS if wanted[0] == 2 else LOGITS)


def test_there_is_something_beside_the_hidden_states():
    with pytest.raises(UsageError, match="logits or weights beside the hidden states, not None"):
        read_dispatch(HIDDEN, None, None, False, None)


def test_copying_repeats_no_rows():
    output = torch.zeros(3, 4)
    assert copy_into(output, HIDDEN) is output
    assert output.eq(1).all()
    with pytest.raises(UsageError, match=r"output \[2, 3, 4\] cannot take what is \[3, 4\]"):
        copy_into(torch.zeros(2, 3, 4), HIDDEN)

"""Dispatch and combine where tokens stay, in both orders of arguments; and by a manager."""

import pytest
import torch

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.device.experts import ExpertTraffic

TRAFFIC = ExpertTraffic()
HIDDEN, LOGITS, IDS, EXTRA = (
    torch.ones(3, 4),
    torch.ones(3, 8),
    torch.zeros(3, 2, dtype=torch.int64),
    torch.ones(3),
)


def _same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a is b or (isinstance(a, list) and len(a) == len(b) and all(map(lambda x, y: x is y, a, b)))


@pytest.mark.parametrize(
    ("args", "kwargs", "want"),
    [
        ((HIDDEN, LOGITS), {}, (HIDDEN, LOGITS)),
        ((HIDDEN, LOGITS, True), {}, (HIDDEN, LOGITS)),
        ((HIDDEN, LOGITS, True, [EXTRA]), {}, (HIDDEN, LOGITS, [EXTRA])),
        ((HIDDEN, LOGITS), {"extra_tensors": [EXTRA]}, (HIDDEN, LOGITS, [EXTRA])),
        ((HIDDEN, LOGITS), {"is_sequence_parallel": True, "extra_tensors": []}, (HIDDEN, LOGITS, [])),
        ((HIDDEN, LOGITS, IDS), {}, (HIDDEN, LOGITS, IDS)),
        ((HIDDEN, LOGITS, IDS, True, (EXTRA,)), {}, (HIDDEN, LOGITS, IDS, [EXTRA])),
    ],
)
def test_dispatch_gives_back_what_it_was_given(args, kwargs, want):
    _same(TRAFFIC.dispatch(*args, **kwargs), want)


def test_dispatch_by_logits():
    _same(TRAFFIC.dispatch_router_logits(HIDDEN, LOGITS), (HIDDEN, LOGITS))
    _same(TRAFFIC.dispatch_router_logits(HIDDEN, LOGITS, True, [EXTRA]), (HIDDEN, LOGITS, [EXTRA]))


def test_combine():
    assert TRAFFIC.combine(HIDDEN) is HIDDEN
    assert TRAFFIC.allocate_combine_input((3, 4), torch.float32, torch.device("cpu")) is None
    output = torch.zeros(3, 4)
    assert TRAFFIC.combine_into_output(HIDDEN, output) is output
    assert output.eq(1).all()
    with pytest.raises(UsageError, match=r"output \[2, 3, 4\] cannot take what is \[3, 4\]"):
        TRAFFIC.combine_into_output(HIDDEN, torch.zeros(2, 3, 4))


def test_nothing_is_prepared_and_a_model_is_a_module():
    assert TRAFFIC.prepare_communication_buffer_for_model(torch.nn.Linear(1, 1)) is None
    for wrong in (None, torch.nn.Linear):
        with pytest.raises(ConfigError, match=r"a model is a torch\.nn\.Module, not"):
            TRAFFIC.prepare_communication_buffer_for_model(wrong)


class Manager:
    """Gives back what it was given."""

    def dispatch(self, *args):
        return ("dispatch", *args)

    def combine(self, *args):
        return ("combine", *args)

    def combine_into_output(self, *args):
        return ("into", *args)

    def allocate_combine_input(self, *args):
        return ("allocate", *args)


def test_a_manager_does_it_where_there_is_one():
    managed = ExpertTraffic()
    managed.all2all_manager = Manager()
    assert managed.dispatch(1, 2, True, [3]) == ("dispatch", 1, 2, True, [3], None)
    assert managed.dispatch_router_logits(1, 2, True, [3]) == ("dispatch", 1, 2, None, True, [3])
    assert managed.combine(1, True) == ("combine", 1, True)
    assert managed.combine_into_output(1, 2, True) == ("into", 1, 2, True)
    assert managed.allocate_combine_input(1, 2, 3, True) == ("allocate", 1, 2, 3, True)
    assert TRAFFIC.all2all_manager is None

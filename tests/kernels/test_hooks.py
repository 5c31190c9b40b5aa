import threading
import warnings

import pytest
import torch

from tcomm.kernels import hooks
from tests.kernels.test_all_reduce import use_tiles
from tests.test_algorithms import TRITON, mistake, reduce_by


class _Recorder:
    """Stands for a channel."""

    def __init__(self):
        self.calls = []

    def kernel_pause(self, *args):
        self.calls.append(args)
        return 1


class _Handle:
    """Looks like a value inside an interpreted kernel."""

    def __init__(self, value):
        self.handle = self
        self.data = torch.tensor([value])


def test_a_kernel_that_waits_outside_of_a_launch_is_an_error():
    with pytest.raises(RuntimeError) as caught:
        hooks.pause(0, 0, 1)
    assert str(caught.value) == "an interpreted kernel waits outside of `interpreting`"


def test_a_pause_goes_to_the_channel_with_plain_unsigned_numbers():
    recorder = _Recorder()
    with hooks.interpreting(recorder):
        assert hooks.pause(_Handle(1), 3, _Handle(-1)) == 1
    assert recorder.calls == [(1, 3, 2**64 - 1)]


def test_a_launch_that_fails_leaves_no_channel_behind():
    with pytest.raises(ZeroDivisionError), hooks.interpreting(_Recorder()):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="outside of"):
        hooks.pause(0, 0, 1)


def test_launches_of_two_threads_take_turns():
    inside, overlaps = [], []

    def launch():
        for _ in range(50):
            with hooks.interpreting(_Recorder()):
                inside.append(1)
                overlaps.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [1] * 200


def _warnings_are_errors(member):
    use_tiles(8192)
    arena = member.arena()
    inf, top = float("inf"), torch.finfo(torch.float16).max
    values = torch.tensor([[inf, inf, top, 1.0], [-inf, inf, top, float("nan")]][member.rank])
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in TRITON:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                result = reduce_by(name, values.to(dtype), arena)
                found.append(result[0].isnan() and result[1] == inf and result[3].isnan())
    assert all(found)


def test_infinities_and_overflow_are_values_and_not_warnings(on_ranks):
    on_ranks(2, _warnings_are_errors)


def _kernel_after_kernel_that_failed(member):
    use_tiles(8192)
    arena = member.arena()
    if member.rank == 0:
        with pytest.raises(ZeroDivisionError), hooks.interpreting(arena.channel):
            raise ZeroDivisionError
    return mistake(member, arena, 1, "triton:two_shot")


def test_a_failed_launch_does_not_hold_the_next_one_up(on_ranks):
    assert on_ranks(2, _kernel_after_kernel_that_failed) == ["", ""]

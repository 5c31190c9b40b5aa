import contextvars
import datetime
import threading

import pytest

from tcomm.groups.parallel.current_config import (
    current_parallel_config,
    get_cpu_distributed_timeout_or_none,
    get_distributed_timeout_or_none,
    use_parallel_config,
)
from tcomm.groups.parallel.parallel_config import ParallelConfig


def test_the_innermost_config_is_in_force_and_the_one_before_comes_back():
    outer, inner = ParallelConfig(), ParallelConfig(tensor_parallel_size=2)
    assert current_parallel_config() is None
    with use_parallel_config(outer) as given:
        assert given is outer
        with pytest.raises(KeyError):
            _fail_under(inner)
        assert current_parallel_config() is outer
        with use_parallel_config(None):
            assert current_parallel_config() is None
        assert current_parallel_config() is outer
    assert current_parallel_config() is None


def _fail_under(config):
    with use_parallel_config(config):
        assert current_parallel_config() is config
        raise KeyError


def test_a_thread_has_its_own():
    seen = []
    with use_parallel_config(config := ParallelConfig()):
        bare = threading.Thread(target=lambda: seen.append(current_parallel_config()))
        within = threading.Thread(
            target=contextvars.copy_context().run, args=(lambda: seen.append(current_parallel_config()),)
        )
        for thread in (bare, within):
            thread.start()
            thread.join(10)
    assert seen == [None, config]


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (get_distributed_timeout_or_none, "distributed_timeout_seconds"),
        (get_cpu_distributed_timeout_or_none, "cpu_distributed_timeout_seconds"),
    ],
)
def test_deadlines_are_those_of_the_config_in_force(ask, field):
    assert ask() is None
    with use_parallel_config(ParallelConfig()):
        assert ask() is None
    with use_parallel_config(ParallelConfig(**{field: 90})):
        assert ask() == datetime.timedelta(seconds=90)

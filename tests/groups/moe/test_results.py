import pytest

from tcomm.errors import UsageError
from tcomm.groups.moe.results import Results


class Handle:
    pass


def test_a_third_live_result_is_refused_until_one_is_combined_or_dropped():
    results = Results("low-latency dispatch")
    first, second, third = Handle(), Handle(), Handle()
    results.admit(first)
    results.refuse_another()
    results.admit(second)
    with pytest.raises(UsageError, match=r"low-latency dispatch: results #1 and #2 are alive"):
        results.refuse_another()
    results.release(first)
    assert [results.is_alive(one) for one in (first, second, third)] == [False, True, False]
    results.refuse_another()
    results.admit(third)
    del second
    results.refuse_another()
    results.release(first)
    assert results.is_alive(third)
    assert results.alive == [third]
    results.clear()
    assert results.alive == []
    results.release(third)
    assert not results.is_alive(third)

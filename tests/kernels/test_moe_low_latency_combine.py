import pytest

from tests.kernels import low_latency_ranks


@pytest.mark.parametrize(("world", "lends"), [(8, False), (3, True)])
def test_virtual_ranks_combine(world, lends):
    low_latency_ranks.check_combine(world, lends=lends)


def test_weights_of_any_number_of_bits():
    low_latency_ranks.check_any_weights(2)

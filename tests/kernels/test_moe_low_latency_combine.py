import pytest

from tests.kernels import low_latency_ranks
from tests.kernels.virtual_arenas import check_rounds


@pytest.mark.parametrize(("world", "lends"), [(8, False), (3, True)])
def test_virtual_ranks_combine(world, lends):
    low_latency_ranks.check_combine(world, lends=lends)


def test_weights_of_any_number_of_bits():
    low_latency_ranks.check_any_weights(2)


@pytest.mark.parametrize("scaling", low_latency_ranks.SCALINGS[::3])
def test_new_tokens_in_the_same_memory(scaling):
    check_rounds(low_latency_ranks.Rounds(2, scaling=scaling), times=3)

import pytest
import torch

from tests.kernels import virtual_tokens
from tests.kernels.virtual_arenas import check_rounds


@pytest.mark.parametrize(
    ("world", "tokens", "hidden", "mode", "staging"),
    [(8, 3, 16, "grid", 1 << 18), (2, 7, 4096, "streams", 100 << 10), (3, 0, 8, "grid", 1 << 18)],
)
def test_virtual_ranks_get_the_rows_that_are_theirs(world, tokens, hidden, mode, staging):
    """The second case goes in pieces."""
    virtual_tokens.check_dispatch("cpu", world, mode, tokens, hidden, staging)


def test_rows_beyond_the_room_are_left_out():
    virtual_tokens.check_room("cpu")


def test_new_tokens_in_the_same_memory_and_room_for_all_that_can_come():
    check_rounds(virtual_tokens.Rounds("cpu", 2, "grid", 4, 16, torch.bfloat16), times=3)


def test_a_rank_that_never_comes_is_named():
    virtual_tokens.check_missing_rank("cpu", 3, 1, timeout=0.3)

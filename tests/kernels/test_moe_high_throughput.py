import pytest

from tests.kernels import virtual_tokens


@pytest.mark.parametrize(
    ("world", "tokens", "hidden", "mode", "staging"),
    [(8, 3, 16, "grid", 1 << 18), (2, 7, 4096, "streams", 100 << 10), (3, 0, 8, "grid", 1 << 18)],
)
def test_virtual_ranks_get_the_rows_that_are_theirs(world, tokens, hidden, mode, staging):
    """The second case goes in pieces."""
    virtual_tokens.check_dispatch("cpu", world, mode, tokens, hidden, staging)


def test_rows_beyond_the_room_are_left_out():
    virtual_tokens.check_room("cpu")

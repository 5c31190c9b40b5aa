import pytest
import torch

from tests.kernels import virtual_tokens


@pytest.mark.parametrize(
    ("world", "tokens", "hidden", "dtype", "staging", "num_terms"),
    [
        (8, 2, 16, torch.float32, 1 << 18, 0),
        (2, 7, 4096, torch.bfloat16, 100 << 10, 1),
        (4, 3, 24, torch.float16, 1 << 18, 2),
    ],
)
def test_virtual_ranks_add_up_what_comes_back(world, tokens, hidden, dtype, staging, num_terms):
    """The second case goes in pieces."""
    virtual_tokens.check_combine("cpu", world, "grid", tokens, hidden, dtype, staging, num_terms)

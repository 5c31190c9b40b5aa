import pytest

from tcomm.errors import ConfigError
from tcomm.memory.token_regions import DispatchRegions, ReturnRegions


def test_the_example_of_the_docstring():
    regions = DispatchRegions(1024, 2, 16, 4)
    assert (regions.num_head_words, regions.num_tokens) == (5, 16)
    assert [regions.list_offset(rank) for rank in (0, 1)] == [128, 192]
    assert (regions.facts_offset, regions.rows_offset) == (256, 512)


@pytest.mark.parametrize("half", [2048, 5000 // 128 * 128, 1 << 20])
@pytest.mark.parametrize("row_nbytes", [16, 528])
def test_regions_follow_one_another_and_end_within_the_half(half, row_nbytes):
    for world, num_facts in ((1, 0), (3, 7), (8, 17)):
        there = DispatchRegions(half, world, row_nbytes, num_facts)
        count = there.num_tokens
        assert there.list_offset(0) >= 8 * there.num_head_words
        assert there.facts_offset >= there.list_offset(world)
        assert there.rows_offset >= there.facts_offset + 4 * num_facts * count
        assert there.rows_offset + count * row_nbytes <= half
        back = ReturnRegions(half, min(world, 2), row_nbytes, num_facts)
        places = back.num_tokens * back.width
        assert back.weights_offset >= places * row_nbytes
        assert back.weights_offset + 4 * num_facts * places <= half


def test_a_half_that_holds_no_token_is_refused():
    for regions in (DispatchRegions(1024, 2, 1024, 0), ReturnRegions(1024, 2, 512, 0)):
        with pytest.raises(ConfigError, match="a half of 1024 bytes holds no token"):
            _ = regions.num_tokens


def test_tokens_that_fit_the_buffer_of_the_documentation():
    there = DispatchRegions(1 << 29, 4, 2 * 7168, 16)
    assert (there.num_tokens, ReturnRegions(1 << 29, 4, 2 * 7168, 8).num_tokens) == (37241, 9341)

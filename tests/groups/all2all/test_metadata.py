import threading
import types

import pytest
import torch

from tcomm.errors import UsageError
from tcomm.groups.all2all.metadata import DPMetadata, current_metadata, use_metadata


def _config(size=3, rank=1, is_moe_model=True):
    return types.SimpleNamespace(data_parallel_size=size, data_parallel_rank=rank, is_moe_model=is_moe_model)


def _made(*counts):
    return DPMetadata.make(_config(len(counts), 0), counts[0], torch.tensor(counts, dtype=torch.int32))


def test_it_is_made_of_counts():
    counts = torch.tensor([5, 0, 8], dtype=torch.int32)
    made = DPMetadata.make(_config(), 0, counts)
    assert made.num_tokens_across_dp_cpu is counts
    assert (int(made.max_tokens_across_dp_cpu), made.local_sizes) == (8, None)
    assert DPMetadata.make(_config(is_moe_model=None), 0, counts).num_tokens_across_dp_cpu is counts


@pytest.mark.parametrize(
    ("config", "tokens", "counts", "told"),
    [
        (_config(1, 0), 5, [5], "data_parallel_size=1"),
        (_config(is_moe_model=False), 0, [5, 0, 8], "is_moe_model=False"),
        (_config(), 5, [5, 0, 8], "0 5: the count of DP rank 1"),
        (_config(), 0, [5, 0], r"counts \[2\] on cpu; give one per DP rank"),
        (_config(), 0, [[5, 0, 8]], r"counts \[1, 3\] on cpu"),
    ],
)
def test_counts_have_to_fit(config, tokens, counts, told):
    with pytest.raises(UsageError, match=told):
        DPMetadata.make(config, tokens, torch.tensor(counts))


def test_shares_of_sequence_parallel_ranks_are_rounded_up():
    made = _made(5, 0, 8)
    with made.sp_local_sizes(1) as sizes:
        assert sizes == made.get_chunk_sizes_across_dp_rank() == [5, 0, 8]
        with made.sp_local_sizes(2) as inner:
            assert inner == made.local_sizes == [3, 3, 0, 0, 4, 4]
        assert made.local_sizes == [5, 0, 8]
    with pytest.raises(UsageError, match="local_sizes is not set"):
        made.get_chunk_sizes_across_dp_rank()
    with pytest.raises(UsageError, match="sequence_parallel_size=0"), made.sp_local_sizes(0):
        pass


def test_chunks_have_a_token_at_least():
    made = _made(5, 0, 8)
    told = []
    for index in range(3):
        with made.chunked_sizes(1, 3, index) as sizes:
            told.append(sizes)
            assert made.get_chunk_sizes_across_dp_rank() is sizes
    assert told == [[3, 1, 3], [2, 1, 3], [1, 1, 2]]
    with made.chunked_sizes(2, 3, 1) as sizes:
        assert sizes == [1, 1, 1, 1, 1, 1]
    assert made.local_sizes is None
    for chunk in ((0, 0), (3, -1)):
        with pytest.raises(UsageError, match="is none"), made.chunked_sizes(1, *chunk):
            pass


def test_cumulative_sums():
    ends = _made(5, 0, 8).cu_tokens_across_sp(2)
    assert (ends.tolist(), ends.dtype) == ([3, 6, 6, 6, 10, 14], torch.int32)
    assert _made(5, 2).cu_tokens_across_sp(1).tolist() == [5, 7]


def test_the_current_one_is_this_threads():
    made, seen = _made(5, 2), []
    assert current_metadata() is None
    with use_metadata(made) as entered:
        assert entered is current_metadata() is made
        with use_metadata(None):
            assert current_metadata() is None
        thread = threading.Thread(target=lambda: seen.append(current_metadata()))
        thread.start()
        thread.join(5)
    assert seen == [None]
    assert current_metadata() is None

import dataclasses

import torch

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.moe.jobs import CombineJob, DispatchJob
from tcomm.groups.moe.routing import Routing
from tcomm.memory.token_regions import DispatchRegions, ReturnRegions

IDX, WEIGHTS = torch.tensor([[0, 3], [1, -1]]), torch.ones(2, 2)
ROUTED = (
    0, torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2),
    [[2, 1], [1, 2]],
)  # fmt: skip
HANDLE = Routing(*ROUTED, 2, 3, 4)
ROOMY = DispatchRegions(4096, 2, 32, 4)
JOB = DispatchJob(torch.ones(2, 8), None, IDX, WEIGHTS, None, 4, 1, 0, None)
CACHED = dataclasses.replace(JOB, topk_idx=None, topk_weights=None, handle=HANDLE)
NARROW = dataclasses.replace(
    JOB, rows=torch.ones(2, 128).to(torch.float8_e4m3fn), scales=torch.ones(2, 1), topk_weights=None
)


def test_what_goes_with_a_row():
    assert [job.num_topk for job in (JOB, CACHED)] == [2, 3]
    assert [len(job.facts) for job in (JOB, CACHED, NARROW)] == [2, 0, 2]
    assert [job.row_nbytes for job in (JOB, NARROW)] == [32, 128]
    assert JOB.regions(4096, 2) == DispatchRegions(4096, 2, 32, 4)
    assert NARROW.regions(4096, 2) == DispatchRegions(4096, 2, 128, 3)


def test_ranks_agree_on_all_but_their_own_tokens():
    more = dataclasses.replace(JOB, rows=torch.ones(5, 8), topk_idx=IDX[:1].repeat(5, 1), seconds=1.0)
    assert more.call(ROOMY).signature == JOB.call(ROOMY).signature
    assert str(JOB.call(ROOMY)) == "dispatch float32 [8] of top-2 of 4 experts, aligned to 1, weights"
    others = [
        CACHED,
        NARROW,
        dataclasses.replace(JOB, topk_weights=None),
        dataclasses.replace(JOB, num_experts=8),
        dataclasses.replace(JOB, expert_alignment=2),
        dataclasses.replace(JOB, num_worst_tokens=9),
        dataclasses.replace(JOB, rows=torch.ones(2, 16)),
        dataclasses.replace(JOB, rows=torch.ones(2, 8).half()),
        dataclasses.replace(NARROW, scales=torch.ones(2, 1, dtype=torch.int32)),
    ]
    assert len({job.call(ROOMY).signature for job in (JOB, *others)}) == len(others) + 1


def test_nobody_agrees_with_a_rank_whose_tokens_do_not_go_in_one_piece():
    small, worst = DispatchRegions(1024, 2, 512, 0), dataclasses.replace(JOB, num_worst_tokens=4)
    assert JOB.find_wrong(small, None) is None
    assert JOB.call(small) == JOB.call(ROOMY)
    assert worst.find_wrong(ROOMY, None) is None
    assert isinstance(worst.find_wrong(small, None), ConfigError)
    assert "2 tokens of which 1 fit the buffer; with num_worst_tokens" in str(worst.find_wrong(small, None))
    assert worst.call(small).signature != worst.call(ROOMY).signature
    assert "2 tokens of which 1 fit the buffer" in str(worst.call(small))
    few = ReturnRegions(256, 2, 64, 0)
    job, known = (
        CombineJob(torch.ones(3, 16), Routing(*ROUTED, most, 3, 4), None, [], None) for most in (None, 2)
    )
    assert "2 tokens of which 1 fit the buffer; after num_worst_tokens" in str(job.find_wrong(few))
    assert job.find_wrong(ReturnRegions(4096, 2, 64, 0)) is known.find_wrong(few) is None
    assert job.call(few).signature != known.call(few).signature


def test_counts_that_cannot_be_are_found_on_all_ranks():
    counts = [[2, 1], [2, 4]]
    assert JOB.find_wrong(ROOMY, counts) is None
    assert dataclasses.replace(JOB, num_worst_tokens=5).find_wrong(ROOMY, counts) is None
    found = dataclasses.replace(JOB, num_worst_tokens=4).find_wrong(ROOMY, counts)
    assert "rank 1 gets 5 rows, more than num_worst_tokens=4" in str(found)
    assert CACHED.find_wrong(ROOMY, [[2, 1], [1, 2]]) is None
    found = CACHED.find_wrong(ROOMY, counts)
    assert isinstance(found, UsageError)
    assert "handles of different dispatches" in str(found)


def test_what_ranks_agree_on_in_a_combine():
    job = CombineJob(torch.ones(3, 8), HANDLE, None, [], None)
    weighted = dataclasses.replace(job, topk_weights=torch.ones(3, 3))
    assert job.regions(4096) == ReturnRegions(4096, 2, 32, 0)
    assert weighted.regions(4096) == ReturnRegions(4096, 2, 32, 3)
    assert (
        str(weighted.call(weighted.regions(4096)))
        == "combine float32 [8] of top-3, weights, rows of dispatch #1"
    )
    assert job.call(job.regions(4096)).signature != weighted.call(job.regions(4096)).signature

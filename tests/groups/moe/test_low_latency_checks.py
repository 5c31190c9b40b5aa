import pytest
import torch

from tcomm.errors import ConfigError
from tcomm.groups.moe import low_latency_checks as checks
from tcomm.memory.moe_slots import SlotLayout

CPU = torch.device("cpu")
LAYOUT = SlotLayout(2, 4, 4, 3, 128, 2)
IDX, WEIGHTS = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
X, Y = torch.ones(4, 128).bfloat16(), torch.ones(4, 8, 128).bfloat16()
WITH_FP8, WITHOUT = (True, False, False), (False, False, False)


def _dispatch(x=X, idx=IDX, scaling=WITHOUT, layout=LAYOUT):
    checks.check_dispatch(x, idx, layout, torch.bfloat16, CPU, scaling)


def _combine(y=Y, idx=IDX, weights=WEIGHTS, out=None):
    checks.check_combine(y, idx, weights, out, IDX, LAYOUT, torch.bfloat16)


def _stats(stats):
    checks.check_statistics(stats, "stats", torch.int32, ((4,),), CPU)


def test_what_fits_is_let_pass():
    _dispatch()
    _dispatch(X[:0], IDX[:0], (False, False, True))
    _combine(out=torch.empty(4, 128, dtype=torch.bfloat16))
    checks.check_statistics(None, "stats", torch.int32, ((4,),), CPU)
    checks.check_statistics(torch.zeros(4, dtype=torch.int32), "stats", torch.int32, ((4,),), CPU)
    checks.check_sizes_of_exchange(1, 8, 2, 1, torch.float16, 2)


@pytest.mark.parametrize(
    ("told", "call"),
    [
        ("5 tokens pass the capacity of 4", lambda: _dispatch(torch.ones(5, 128).bfloat16())),
        (r"x is float32 \[4, 128\] on cpu; give bfloat16 \[T, 128\]", lambda: _dispatch(X.float())),
        (r"x is bfloat16 \[4, 64\]", lambda: _dispatch(X[:, :64])),
        (r"topk_idx is int32 \[4, 2\]", lambda: _dispatch(idx=IDX.int())),
        (r"give int64 \[4, k\]", lambda: _dispatch(idx=IDX[:3])),
        ("topk_idx is on meta", lambda: _dispatch(idx=IDX.to("meta"))),
        ("4 choices a token", lambda: _dispatch(idx=torch.zeros(4, 4).long())),
        ("token 1 has expert 8 at entry 0", lambda: _dispatch(idx=IDX + torch.tensor([[0], [8], [9], [0]]))),
        ("token 0 has expert -2 at entry 0", lambda: _dispatch(idx=IDX - 2)),
        ("needs round_scale=True", lambda: _dispatch(scaling=(True, False, True))),
        ("multiple of 128, not 136", lambda: _dispatch(
            torch.ones(4, 136).bfloat16(), scaling=WITH_FP8, layout=SlotLayout(2, 4, 4, 3, 136, 2)
        )),
        ("stats is int64", lambda: checks.check_statistics(IDX, "stats", torch.int32, ((4, 2),), CPU)),
        (r"give int32 \[4\] or \[2\]", lambda: checks.check_statistics(
            IDX.int(), "stats", torch.int32, ((4,), (2,)), CPU
        )),
        (r"x is float32 \[4, 8, 128\] on cpu; give bfloat16 \[4, 8, 128\]", lambda: _combine(Y.float())),
        (r"x is bfloat16 \[3, 8, 128\]", lambda: _combine(Y[:3])),
        (r"topk_idx is \[4, 1\]; its dispatch had \[4, 2\]", lambda: _combine(idx=IDX[:, :1])),
        ("token 2 chooses other experts", lambda: _combine(idx=IDX + torch.tensor([[0], [0], [1], [1]]))),
        ("topk_weights is float64", lambda: _combine(weights=WEIGHTS.double())),
        (r"topk_weights is float32 \[3, 2\]", lambda: _combine(weights=WEIGHTS[:3])),
        (r"out= of low_latency combine is bfloat16 \[3, 128\]", lambda: _combine(out=X[:3])),
        ("contiguous", lambda: _combine(out=torch.ones(128, 4).bfloat16().t())),
        ("topk_idx takes a torch.Tensor, not list", lambda: _dispatch(idx=[[0]])),
        ("topk_weights takes a torch.Tensor, not NoneType", lambda: _combine(weights=None)),
        ("topk_weights takes a dense tensor", lambda: _combine(weights=WEIGHTS.to_sparse())),
        (r"topk_weights is float32 \[4, 2\] on meta", lambda: _combine(weights=WEIGHTS.to("meta"))),
        (r"out= of low_latency combine is bfloat16 \[4, 128\] on meta", lambda: _combine(out=X.to("meta"))),
        ("lose the gradient", lambda: _combine(out=X.clone().requires_grad_())),
        ("overlaps", lambda: _combine(out=Y.view(-1, 128)[2:6])),
        ("stats takes a torch.Tensor, not list", lambda: _stats([0] * 4)),
        (r"stats is int32 \[4\] on meta", lambda: _stats(IDX[:, 0].int().to("meta"))),
        ("contiguous", lambda: _stats(IDX.int()[:, 0])),
        ("contiguous", lambda: _stats(torch.zeros(1, dtype=torch.int32).expand(4))),
        ("num_max_tokens=0", lambda: checks.check_sizes_of_exchange(0, 128, 8, 2, torch.bfloat16, 2)),
        ("12 is no multiple of 8", lambda: checks.check_sizes_of_exchange(4, 12, 8, 2, torch.bfloat16, 2)),
        ("num_experts=9 do not", lambda: checks.check_sizes_of_exchange(4, 128, 9, 2, torch.bfloat16, 2)),
        ("max_topk=2.0", lambda: checks.check_sizes_of_exchange(4, 128, 8, 2.0, torch.bfloat16, 2)),
        ("dtype=torch.float64", lambda: checks.check_sizes_of_exchange(4, 128, 8, 2, torch.float64, 2)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(told, call):
    with pytest.raises(ConfigError, match=told):
        call()

import pytest
import torch

from tcomm.errors import ConfigError
from tcomm.groups.moe.routing import Routing
from tcomm.groups.moe.token_checks import check_choices, check_results, check_rounding, check_tokens

CPU = torch.device("cpu")
X, IDX = torch.ones(2, 8), torch.tensor([[0, 3], [1, -1]])
NARROW = torch.ones(2, 640).to(torch.float8_e4m3fn)


def routing(num_tokens=2, num_rows=3):
    slots, rows = torch.zeros(num_tokens, 2, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int64)
    return Routing(0, slots, rows, torch.zeros(2, 2), None, None, 2, 4)


def test_rows_and_scales_that_are_right_come_back():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows, scales = check_tokens(X.to(dtype), CPU)
        assert rows.dtype == dtype
        assert scales is None
    for told in (torch.ones(2, 5), torch.ones(2, 2, dtype=torch.int32)):
        rows, scales = check_tokens((NARROW, told), CPU)
        assert rows is NARROW
        assert torch.equal(scales, told)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (3, "x takes a torch.Tensor, not int"),
        (X[0], r"x is \[8\]; give a contiguous"),
        (X.t(), "contiguous"),
        (X.double(), "x is torch.float64"),
        (torch.ones(2, 12), "hidden a multiple of 8"),
        (torch.ones(2, 0), "hidden a multiple of 8"),
        (X.to("meta"), "x is on meta, and the buffer is for tensors on cpu"),
        (NARROW, "without scales"),
        ((X, X), "with scales"),
        ((NARROW, torch.ones(2, 4)), r"scales torch.float32 \[2, 4\]"),
        ((NARROW, torch.ones(1, 5)), r"scales torch.float32 \[1, 5\]"),
        ((NARROW, torch.ones(2, 5).double()), "scales torch.float64"),
        ((NARROW, torch.ones(2, 5).to("meta")), "x's tensor of scales is on meta"),
        ((NARROW[:, :72].contiguous(), torch.ones(2, 0)), "give hidden a multiple of 128"),
    ],
)
def test_rows_that_cannot_travel_are_refused(x, told):
    with pytest.raises(ConfigError, match=told):
        check_tokens(x, CPU)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((2, None, None, 4, 2, None), "needs topk_idx, or the handle"),
        ((2, IDX + 1, None, 4, 2, None), "token 0 has expert 4 at entry 1"),
        ((3, IDX, None, 4, 2, None), r"topk_idx is torch.int64 \[2, 2\]; give torch.int64 \[3, 2\]"),
        ((2, IDX, IDX, 4, 2, None), "topk_weights is torch.int64"),
        ((2, IDX, X[:, :2].to("meta"), 4, 2, None), "topk_weights is on meta"),
        ((2, IDX, None, 4, 2, routing()), "takes no topk_idx"),
        ((2, None, X, 4, 2, routing()), "takes no topk_idx and no topk_weights"),
        ((1, None, None, 4, 2, routing()), "x has 1 tokens, the dispatch of the handle had 2"),
        ((2, None, None, 4, 2, (1, 2)), "handle is a tuple"),
        ((2, None, None, 6, 3, routing()), "the handle is of 2 ranks, and the buffer of 3"),
    ],
)
def test_choices_that_do_not_fit_the_tokens_are_refused(arguments, told):
    with pytest.raises(ConfigError, match=told):
        check_choices(*arguments, CPU)


def test_a_gpu_may_be_waited_for_only_when_that_is_allowed():
    on_device = IDX.to("meta")
    check_choices(2, on_device, None, 4, 2, None, on_device.device, may_wait=False)
    with pytest.raises(RuntimeError, match="meta tensors"):
        check_choices(2, on_device, None, 4, 2, None, on_device.device)
    with pytest.raises(ConfigError, match="token 0 has expert 4"):
        check_choices(2, IDX + 1, None, 4, 2, None, CPU, may_wait=False)


def test_numbers_that_round_up_are_positive():
    for wrong in ((0, 0), (1.0, 0)):
        with pytest.raises(ConfigError, match="expert_alignment="):
            check_rounding(*wrong)
    for wrong in ((1, -1), (1, 2.0)):
        with pytest.raises(ConfigError, match="num_worst_tokens="):
            check_rounding(*wrong)


def test_bias_comes_back_as_a_list():
    rows, term = torch.ones(3, 8), torch.ones(2, 8)
    given = [(None, 0), (term, 1), ((term, term), 2), ([], 0)]
    assert [len(check_results(rows, routing(), None, bias, 2, CPU)) for bias, _ in given] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((torch.ones(3, 8), None, None, None), "handle is a NoneType"),
        ((torch.ones(2, 8), routing(), None, None), "x has 2 rows, the dispatch of the handle gave 3"),
        ((torch.ones(3, 8).double(), routing(), None, None), "x is torch.float64"),
        ((torch.ones(3, 8), routing(), torch.ones(3, 3), None), r"topk_weights is torch.float32 \[3, 3\]"),
        ((torch.ones(3, 8), routing(), None, torch.ones(3, 8)), r"bias is torch.float32 \[3, 8\]"),
        ((torch.ones(3, 8), routing(), None, (X, X, X)), "bias has 3 tensors"),
    ],
)
def test_results_that_do_not_fit_the_dispatch_are_refused(arguments, told):
    with pytest.raises(ConfigError, match=told):
        check_results(*arguments, 2, CPU)

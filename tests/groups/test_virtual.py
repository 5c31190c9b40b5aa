"""Virtual ranks in the interpreter. `tests/gpu` runs the same bodies, compiled."""

import random
import threading
import time

import pytest
import torch
from torch.autograd import forward_ad

from tcomm import ConfigError, PeerTimeoutError, VirtualRanks
from tcomm.errors import CapabilityError
from tcomm.kernels import schedule
from tcomm.memory.control import EPOCH_MASK, Word
from tests import virtual_worlds as worlds
from tests.virtual_worlds import CASES, MODES, call, make, put, without

every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_verb_means_what_the_reference_says(world):
    worlds.check_meaning("cpu", world, "grid", (0, 1, 13))


def test_every_verb_means_what_the_reference_says_to_eight_ranks():
    worlds.check_meaning("cpu", 8, "grid", (13,))


def test_launches_one_for_each_rank_mean_the_same():
    worlds.check_meaning("cpu", 3, "streams", (13,))


def test_tiles_and_tails_of_the_interpreter():
    worlds.check_meaning("cpu", 2, "grid", (65536 * 2 + 24,))


def test_every_operation_and_dtype_has_the_bits_of_the_reference():
    worlds.check_reductions("cpu", 2, "grid", 77)


def test_every_dtype_moves():
    worlds.check_moves("cpu", 2, "grid")


def test_long_messages_go_in_pieces():
    worlds.check_pieces("cpu", 2, "grid")


def test_the_output_may_be_the_input():
    worlds.check_in_place("cpu", 3, "grid")


def test_nothing_around_a_tensor_is_touched():
    worlds.check_guard_bands("cpu", 3, "grid", (1, 13))


@every_mode
def test_memory_is_reused_by_calls_back_to_back(mode):
    worlds.check_reuse("cpu", 3, mode, 12)


@pytest.mark.parametrize("seed", range(2))
def test_any_interleaving_gives_the_same(seed, monkeypatch):
    monkeypatch.setattr(schedule, "_order", random.Random(seed))
    worlds.check_reuse("cpu", 4, MODES[seed % 2], 15, seed=seed)


@pytest.mark.parametrize(
    ("start", "mode"),
    [
        (2**32 - 4, "grid"),
        (2**32 - 4, "streams"),
        (2**31 - 4, "grid"),
        (2**30 - 4, "streams"),
        (3 * 2**30 - 4, "grid"),
    ],
)
def test_epochs_go_on_across_a_wrap_and_a_renewal(start, mode):
    worlds.check_epochs_near("cpu", 2, mode, start)


@pytest.mark.parametrize(("verb", "algorithm"), CASES)
def test_a_rank_that_never_comes_is_named(verb, algorithm):
    worlds.check_missing_rank("cpu", 3, verb, algorithm, missing=1, timeout=0.4)


def test_a_first_rank_that_never_comes_is_named():
    worlds.check_missing_rank("cpu", 2, "all_reduce", "two_shot", missing=0, timeout=0.4)


def test_a_barrier_without_a_rank_ends():
    ranks = make("cpu", 3, "streams")
    ranks.barrier()
    without(ranks, 2)
    with pytest.raises(PeerTimeoutError, match=r"^barrier: virtual rank 0 waited for rank 2, .* \(0\.3 s\)"):
        ranks.barrier(timeout=0.3)


def test_the_host_ends_a_wait_without_a_deadline():
    ranks = make("cpu", 2, "streams", timeout=None)
    without(ranks, 1)
    x = put(ranks, [torch.ones(5)] * 2)
    timer = threading.Timer(0.3, ranks.arena.channel.abort)
    started = time.monotonic()
    timer.start()
    with pytest.raises(
        PeerTimeoutError, match=r"waited for rank 1, which did not come in time \(no deadline\)"
    ):
        ranks.all_reduce(x)
    assert time.monotonic() - started > 0.25
    timer.join()


def test_staging_made_late_in_an_epoch_holds_no_arrival():
    ranks = make("cpu", 2)
    ranks.arena.set_epoch(2**31 - 2)
    ranks.prepare(4096)
    staging = ranks.arena.staging
    lanes = staging.buffer.peer(1, dtype=torch.int64)[: staging.layout.half_offset // 8]
    # Half a wrap away, and not the mark of lanes that belong to epoch 0: the epoch after next.
    assert {int(word) >> 32 & EPOCH_MASK for word in lanes} == {2**32 - 2}
    job = worlds.make_jobs(ranks, (100,), (torch.float32,))[0]
    assert worlds.run_jobs(ranks, [job], 3, random.Random(0)) == 0


def test_prepare_makes_long_messages_one_call():
    ranks = make("cpu", 2, staging_bytes=64 * 1024)
    x = put(ranks, [torch.arange(50_000.0)] * 2)
    ranks.all_reduce(x)
    pieces = worlds.epochs(ranks)[0]
    ranks.prepare(x[0].nbytes)
    assert torch.equal(ranks.all_reduce(x), 2 * x)
    assert pieces > 1
    assert worlds.epochs(ranks) == [pieces + 1] * 2


def test_rows_are_apart_by_whole_vectors():
    ranks = make("cpu", 3)
    for shape, dtype in (
        ((), torch.float32),
        ((0,), torch.int8),
        ((5,), torch.bool),
        ((2, 3), torch.bfloat16),
    ):
        x = ranks.empty(*shape, dtype=dtype)
        assert x.shape == (3, *shape)
        assert x.dtype == dtype
        assert x.numel() == 0 or x.stride(0) * x.itemsize % 16 == 0


def test_tensors_of_any_shape_are_reduced():
    ranks = make("cpu", 2)
    for shape in ((), (0,), (3, 0, 5), (2, 3, 11)):
        inputs = worlds.every_ranks_input(1, 2, shape, torch.float32)
        got = ranks.all_reduce(put(ranks, inputs), algorithm="two_shot")
        assert torch.equal(got, torch.stack([inputs[0] + inputs[1]] * 2))


@pytest.mark.parametrize("world", [0, 17])
def test_worlds_have_a_size(world):
    with pytest.raises(ConfigError) as caught:
        VirtualRanks(world, "cpu")
    assert str(caught.value) == f"world_size={world}: virtual ranks are 1 to 16"


def test_sixteen_ranks_are_the_most():
    assert worlds.mistake(make("cpu", 16), 0, "all_reduce", "one_shot_pull", torch.float32, 5) == ""


def refused(found, verb, *args, **kwargs):
    ranks = make("cpu", 2)
    before = worlds.epochs(ranks)
    with pytest.raises(ConfigError) as caught:
        getattr(ranks, verb)(*args, **kwargs)
    assert str(caught.value) == found
    assert worlds.epochs(ranks) == before
    assert worlds.mistake(ranks, 0, "all_reduce", "two_shot", torch.float32, 5) == ""


ROWS = "rows 20 bytes apart: those of virtual ranks begin at multiples of 16 bytes; "


NO_ROWS = "it must have a row for each of 2 virtual ranks"
NOT_DENSE = "a kernel needs contiguous rows; call .contiguous() first"
ODD = "x is [2, 5]; a row must have a multiple of 2 elements"
X, FIVE = torch.ones(2, 4), torch.ones(2, 8)[:, :5]


@pytest.mark.parametrize(
    ("found", "verb", "args", "kwargs"),
    [
        ("op 'prod' is not among sum, avg, max, min", "all_reduce", (X, "prod"), {}),
        (
            "algorithm='ring' is not among one_shot_ll, one_shot_push, one_shot_pull, two_shot",
            "all_reduce", (X,), {"algorithm": "ring"},
        ),
        ("algorithm='x' is not among push, pull", "broadcast", (X, 0), {"algorithm": "x"}),
        (f"x is [3, 4]; {NO_ROWS}", "all_reduce", (torch.ones(3, 4),), {}),
        (f"x is [3, 4]; {NO_ROWS}", "all_gather_single", (torch.ones(3, 4),), {}),
        (f"x is []; {NO_ROWS}", "all_to_all_single", (torch.ones(()),), {}),
        (ROWS + "make the tensor by VirtualRanks.empty()", "all_reduce", (torch.ones(2, 5),), {}),
        (ROWS + "make the tensor by VirtualRanks.empty()", "broadcast", (torch.ones(2, 5), 1), {}),
        (ODD, "all_to_all_single", (FIVE,), {}),
        (ODD, "reduce_scatter_single", (FIVE,), {}),
        (NOT_DENSE, "all_gather_single", (torch.ones(2, 8)[:, ::2],), {}),
        (NOT_DENSE, "all_gather_single", (X,), {"out": torch.ones(2, 16)[:, ::2]}),
        ("root=2 is none of 2 virtual ranks", "broadcast", (X, 2), {}),
        ("root=-1 is none of 2 virtual ranks", "broadcast", (X, -1), {}),
        ("out is float32 [2, 4]; it must be float32 [2, 8]", "all_gather_single", (X,), {"out": X.clone()}),
        ("out is float32 [1, 4]; it must be float32 [2, 4]", "all_reduce", (X,), {"out": torch.ones(1, 4)}),
        ("out is float16 [2, 4]; it must be float32 [2, 4]", "all_reduce", (X,), {"out": X.half()}),
        ("x is on meta; these virtual ranks are on cpu", "all_reduce", (X.to("meta"),), {}),
        (
            "the average of torch.int32 is not a torch.int32; use sum, or a floating-point tensor",
            "reduce_scatter_single", (X.int(), "avg"), {},
        ),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_before_anything_is_sent(found, verb, args, kwargs):
    refused(found, verb, *args, **kwargs)


def test_an_output_that_lacks_a_row_is_refused_by_a_bound_call_too():
    ranks = make("cpu", 2)
    x = put(ranks, [torch.ones(4)] * 2)
    ranks.all_reduce(x, out=ranks.empty(4))
    with pytest.raises(ConfigError, match=r"out is float32 \[1, 4\]; it must be float32 \[2, 4\]"):
        ranks.all_reduce(x, out=ranks.empty(4)[:1])


def test_lanes_refuse_long_elements():
    ranks = make("cpu", 2)
    with pytest.raises(CapabilityError) as caught:
        ranks.all_reduce(ranks.empty(4, dtype=torch.float64), algorithm="one_shot_ll")
    assert str(caught.value) == "a lane carries 32 bits; torch.float64 has 64"


@pytest.mark.parametrize("timeout", [0, -1.0, "soon"])
def test_a_timeout_is_a_time(timeout):
    with pytest.raises(ConfigError):
        make("cpu", 2, timeout=timeout)


def test_a_mode_is_one_of_two():
    with pytest.raises(ConfigError) as caught:
        make("cpu", 2, mode="threads")
    assert str(caught.value) == "mode='threads' is neither 'grid' nor 'streams'"


def test_staging_has_a_least_size():
    with pytest.raises(
        ConfigError, match=r"^staging of 1000 bytes a rank is too small; give at least 65536$"
    ):
        make("cpu", 2, staging_bytes=1000)


def test_a_call_that_differs_between_ranks_is_a_mismatch():
    """What no caller can do, and a broken kernel could: two ranks of one call with other signatures."""
    ranks = make("cpu", 2)
    x = put(ranks, [torch.ones(4)] * 2)
    ranks.all_reduce(x)
    ranks.arena.pages[0, Word.EPOCH] += 1
    with pytest.raises(PeerTimeoutError):
        call(ranks, "all_reduce", "two_shot", x, timeout=0.3)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch itself uses it for gradients of forward mode
def test_transforms_and_gradients_of_forward_mode_are_refused():
    ranks, x = make("cpu", 2, "grid"), torch.ones(2, 4)
    with pytest.raises(ConfigError, match=r"all_reduce cannot run inside of vmap of torch\.func"):
        torch.func.vmap(ranks.all_reduce)(torch.ones(3, 2, 4))
    with forward_ad.dual_level():
        with pytest.raises(ConfigError, match="x requires a gradient, which would be lost"):
            ranks.all_reduce(forward_ad.make_dual(x, x))
        assert ranks.all_reduce(x).eq(2).all()

import pytest
import torch
import triton
import triton.language as tl

from tcomm.errors import PeerTimeoutError
from tcomm.kernels import moe_slot_rows
from tcomm.kernels.moe_low_latency import receive_copies, send_copies
from tcomm.kernels.moe_slot_rows import copy_row, launch_of, row_block
from tcomm.memory.control import Word
from tests.kernels.low_latency_ranks import CALL, VirtualExchange


@triton.jit
def _copy_kernel(src_ptr, dst_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    copy_row(src_ptr, dst_ptr, WORDS, BLOCK)


@pytest.mark.parametrize("words", [4, 16, 20, 36])
def test_a_row_is_copied_in_full_tiles_and_a_rest(words):
    row, out = torch.randn(words), torch.zeros(48)
    _copy_kernel[(1,)](row, out, words, 16)
    assert torch.equal(out[:words], row)
    assert not out[words:].any()


def test_a_program_copies_a_short_row_at_once():
    assert row_block(512) == 128
    assert row_block(640) == 256


def test_a_kernel_gets_those_constants_that_it_takes(monkeypatch):
    ranks = VirtualExchange(3)
    told = []
    monkeypatch.setattr(
        moe_slot_rows, "launch_part", lambda *args, **constants: told.append((args, constants))
    )

    def kernel():
        pass

    kernel.arg_names = ["rows_ptr", "SLOTS", "HIDDEN", "MORE"]
    launch_of(kernel, ranks.arena, ranks.layout, MORE=3)(1, CALL, 2.0, 7, "tensor")
    ((args, constants),) = told
    assert args == (kernel, 1, ranks.arena, CALL, 2.0, 7, "tensor")
    assert constants == {"SLOTS": 4, "HIDDEN": 128, "MORE": 3}


def test_words_of_another_epoch_are_an_error():
    ranks = VirtualExchange(3)
    ranks.dispatch()
    epoch = send_copies(
        ranks.arena, CALL, 20.0, ranks.layout, ranks.form, ranks.x, ranks.idx, ranks.slots, ranks.counts
    )
    staging = ranks.arena.staging
    words = staging.buffer.peer(1, (3, 2), torch.int64, staging.layout.half(epoch & 1))
    words[2, 1] -= 2 << 32
    ranks.arena.pages[1, Word.LEFT_OUT] = 1 << 0
    words[0, 1] -= 2 << 32  # of a rank that is left out, so of no meaning
    received = ranks.received.clone()
    ranks.received[:] = -1
    with pytest.raises(PeerTimeoutError, match="virtual rank 1 waited for rank 2"):
        receive_copies(
            ranks.arena, CALL, 20.0, epoch, ranks.layout, ranks.form, ranks.rows, ranks.scales,
            ranks.src_info, ranks.ranges, ranks.received, None, None,
        )  # fmt: skip
    assert ranks.received[[0, 2]].tolist() == received[[0, 2]].tolist()
    assert ranks.received[1].tolist() == [-1, -1]

import torch

from tcomm.memory.moe_slots import RowFormat, SlotLayout


def test_formats():
    plain = RowFormat(640, torch.bfloat16)
    assert (plain.wire_dtype, plain.row_nbytes, plain.num_scale_words) == (torch.bfloat16, 1280, 0)
    assert (plain.wire_nbytes, str(plain)) == (1284, "")
    scaled = RowFormat(640, torch.bfloat16, True)
    assert (scaled.row_nbytes, scaled.num_scale_words, scaled.scale_dtype) == (640, 5, torch.float32)
    assert (scaled.wire_dtype, scaled.wire_nbytes) == (torch.float8_e4m3fn, 640 + 20 + 4)
    packed = RowFormat(640, torch.bfloat16, True, True, True)
    assert (packed.num_scale_words, packed.scale_dtype, packed.wire_nbytes) == (2, torch.int32, 640 + 8 + 4)
    assert str(packed) == "use_fp8 round_scale use_ue8m0"


def test_memory_of_the_example_of_the_documentation():
    layout = SlotLayout(8, 32, 128, 8, 7168, 2)
    result = layout.num_local_experts * layout.capacity * layout.hidden * layout.itemsize
    assert [round(nbytes / 1e6) for nbytes in (layout.half_nbytes, result)] == [119, 470]


def test_slots_of_the_example():
    layout = SlotLayout(2, 2, 3, 8, 8, 2)
    assert (layout.slots, layout.capacity, layout.words_nbytes) == (6, 6, 128)
    assert (layout.rows_offset, layout.scales_offset, layout.indices_offset) == (128, 384, 384)
    assert (layout.half_nbytes, layout.combine_nbytes) == (512, 2 * 6 * 8 * 2 + 64)
    wide = SlotLayout(2, 4, 3, 2, 640, 2)
    assert (wide.slots, wide.indices_offset - wide.scales_offset) == (6, 256)

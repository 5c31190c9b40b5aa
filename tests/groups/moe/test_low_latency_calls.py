import torch

from tcomm.groups.moe.low_latency_calls import LowLatencyHandle, Packed
from tcomm.memory.moe_slots import RowFormat, SlotLayout

LAYOUT = SlotLayout(2, 3, 4, 8, 640, 2)


def test_results_of_every_format_lie_at_the_same_addresses():
    packed = Packed(1, LAYOUT, torch.device("cpu"))
    plain = packed.rows_as(RowFormat(640, torch.bfloat16))
    scaled = RowFormat(640, torch.bfloat16, True)
    exponents = RowFormat(640, torch.bfloat16, True, True, True)
    assert (plain.shape, plain.dtype) == ((3, 8, 640), torch.bfloat16)
    assert packed.rows_as(scaled).shape == (3, 8, 640)
    assert packed.rows_as(scaled).data_ptr() == plain.data_ptr()
    assert (packed.scales_as(scaled).shape, packed.scales_as(scaled).stride()) == ((3, 8, 5), (40, 1, 8))
    assert (packed.scales_as(exponents).shape, packed.scales_as(exponents).dtype) == ((3, 8, 2), torch.int32)
    assert packed.number == 1
    assert (packed.counts.tolist(), packed.src_info.shape, packed.ranges.shape) == ([0] * 3, (3, 8), (3, 2))


def test_a_handle_is_read_like_a_tuple():
    packed = Packed(0, LAYOUT, torch.device("cpu"))
    handle = LowLatencyHandle(packed, LAYOUT, torch.zeros(1, 2, dtype=torch.int64))
    src_info, layout_range, *sizes = handle
    assert src_info is packed.src_info is handle[0]
    assert layout_range is packed.ranges
    assert sizes == [4, 640, 6]
    assert len(handle) == 5

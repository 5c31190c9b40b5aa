import os

import pytest
import torch

from tcomm.memory.base import SymmetricBuffer


def _buffer(nbytes=256, world_size=3, rank=1):
    return SymmetricBuffer(rank, [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(world_size)])


def test_a_table_holds_the_address_of_every_ranks_buffer():
    buffer = _buffer()
    addresses = [buffer.peer(rank).data_ptr() for rank in range(3)]
    assert buffer.table.dtype == torch.int64
    assert buffer.table.tolist() == addresses
    assert len(set(addresses)) == 3
    assert buffer.local.data_ptr() == addresses[1]
    assert (buffer.nbytes, buffer.world_size) == (256, 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "offset"),
    [
        ((2, 3), torch.float32, 64),
        ((), torch.float64, 8),
        ((0,), torch.int64, 256),
        ((1, 1), torch.int16, 254),
    ],
)
def test_a_view_has_shape_dtype_and_place_and_no_memory_of_its_own(shape, dtype, offset):
    buffer = _buffer()
    view = buffer.peer(2, shape, dtype, offset)
    assert (tuple(view.shape), view.dtype) == (shape, dtype)
    if view.numel():
        assert view.data_ptr() == buffer.peer(2).data_ptr() + offset
        view.fill_(1)
        assert buffer.peer(2, None, dtype)[offset // dtype.itemsize] == 1
        assert buffer.peer(0).eq(0).all()
        assert buffer.local.eq(0).all()


def test_without_a_shape_a_view_is_all_that_follows():
    assert _buffer().peer(0, dtype=torch.float32, offset=64).shape == (48,)


@pytest.mark.parametrize(("numel", "offset"), [(65, 0), (1, 256), (2, 252), (10**9, 0)])
def test_a_view_past_the_end_is_refused(numel, offset):
    with pytest.raises(IndexError) as caught:
        _buffer().peer(0, (numel,), torch.float32, offset)
    assert str(caught.value) == (f"{4 * numel} bytes at offset {offset} pass the end of a buffer of 256")


def test_a_view_may_begin_past_two_gib(tmp_path):
    nbytes = (6 << 30) + 4096
    path = str(tmp_path / "sparse")
    memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage.from_file(path, True, nbytes))
    buffer = SymmetricBuffer(0, [memory])
    buffer.peer(0, (3,), torch.int32, 5 << 30).fill_(7)
    assert bytes(buffer.local[(5 << 30) - 1 : (5 << 30) + 13].numpy()) == b"\0" + b"\7\0\0\0" * 3 + b"\0"
    assert os.stat(path).st_blocks * 512 < 1 << 20

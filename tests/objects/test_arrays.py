import numpy as np
import pytest
import torch

from tcomm.errors import DecodeError
from tcomm.objects.arrays import (
    NUMBERS,
    TENSOR_DTYPES,
    TORCH_DTYPES,
    array_bytes,
    make_array,
    make_number,
    make_tensor,
    number_name,
    tensor_bytes,
)
from tcomm.objects.payload import Payload


def test_dtypes_have_names():
    assert number_name(np.dtype("f4")) == "<f4f"
    assert number_name(np.dtype(">i8")) == ">i8l"
    assert {"<i8l", "<i8q", "|b1?", "<f2e", "<c8F", ">u4I"} <= set(NUMBERS)
    assert all(number_name(dtype) == name for name, dtype in NUMBERS.items())
    assert TORCH_DTYPES["bfloat16"] is torch.bfloat16
    assert TENSOR_DTYPES["float8_e4m3fn"] is torch.float8_e4m3fn
    assert "qint8" in TORCH_DTYPES
    assert "qint8" not in TENSOR_DTYPES


def test_bytes_are_in_c_order_and_a_view_where_they_can_be():
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert bytes(array_bytes(array)) == array.tobytes()
    assert bytes(array_bytes(array.T)) == array.T.tobytes()
    assert np.shares_memory(np.frombuffer(array_bytes(array), np.uint8), array)
    assert array_bytes(np.zeros((0, 3))).nbytes == 0
    tensor = torch.from_numpy(array)
    assert bytes(tensor_bytes(tensor)) == array.tobytes()
    assert bytes(tensor_bytes(tensor.t()[1:])) == array.T[1:].tobytes()
    assert np.shares_memory(np.frombuffer(tensor_bytes(tensor), np.uint8), array)
    assert array_bytes(array).format == tensor_bytes(tensor).format == "B"


@pytest.mark.parametrize("borrow", [False, True])
def test_arrays_are_made_of_their_bytes(borrow):
    memory = memoryview(bytearray(8) + np.arange(6, dtype=np.float32).tobytes())
    payload, nothing = Payload(memory, 8, 32), Payload(memory, 8, 8)
    array = make_array("<f4f", [2, 3], payload, borrow)
    tensor = make_tensor("float32", [2, 3], payload, borrow)
    assert array.tolist() == tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    memory[11] = 0x41
    assert array[0, 0] == tensor[0, 0] == (8 if borrow else 0)
    assert array.flags.writeable
    assert array.flags.owndata is not borrow
    assert make_tensor("int8", [0, 3], nothing, borrow).shape == (0, 3)
    for make, name in ((make_array, "<f4f"), (make_tensor, "float32")):
        with pytest.raises(DecodeError, match=r"an array of shape \(5,\), 4 bytes each, came with 24 bytes"):
            make(name, [5], payload, borrow)
        for shape in (["6"], [True, 6], [-6], [6, *[1] * 64]):
            with pytest.raises(DecodeError, match="no possible shape"):
                make(name, shape, payload, borrow)
        with pytest.raises(DecodeError, match="larger than any memory"):
            make(name, [2**61, 0], payload, borrow)


def test_numbers_are_made_of_their_bytes():
    number = make_number("<f4f", np.float32(1.5).tobytes())
    assert type(number) is np.float32
    assert number == 1.5
    with pytest.raises(DecodeError, match="came with 3 bytes"):
        make_number("<f4f", b"abc")

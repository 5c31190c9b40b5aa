"""Numpy arrays and torch tensors as bytes without a copy, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tcomm.errors import DecodeError
from tcomm.objects.payload import Payload

__all__ = [
    "NUMBERS",
    "TENSOR_DTYPES",
    "TORCH_DTYPES",
    "array_bytes",
    "make_array",
    "make_number",
    "make_tensor",
    "number_name",
    "tensor_bytes",
]

_MAX_DIMENSIONS = 64
_MAX_NBYTES = 1 << 62


def number_name(dtype: np.dtype[Any]) -> str:
    """A numpy dtype by byte order, size and character, such as `<f4f`; see `NUMBERS`."""
    return dtype.str + dtype.char


def _numbers() -> dict[str, np.dtype[Any]]:
    native = [np.dtype(char) for char in "?bhilqBHILQefdgFDG"]
    both = [*native, *(dtype.newbyteorder() for dtype in native)]
    return {number_name(dtype): dtype for dtype in both}


NUMBERS = _numbers()
"""The numpy dtypes that travel, by name: all numeric ones of either byte order."""
TORCH_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if type(dtype) is torch.dtype
}
"""Every torch.dtype, by its name without `torch.`."""
TENSOR_DTYPES = {name: dtype for name, dtype in TORCH_DTYPES.items() if not name.startswith(("q", "bits"))}
"""Those whose tensors travel: all but the quantised ones and bare bits."""


def array_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """The elements in C order; a view where they lie so, else of a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in C order; a view where they lie so on the CPU, else of a copy."""
    dense = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    # A dimension of one element may have any stride, which a view of another dtype would mind.
    view: memoryview = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data
    return view


def _check_shape(shape: Sequence[object], itemsize: int, nbytes: int) -> tuple[int, ...]:
    """`shape`, when it is one and its elements are exactly the bytes that came."""
    sizes = tuple(size for size in shape if type(size) is int and 0 <= size < _MAX_NBYTES)
    if len(sizes) != len(shape) or len(sizes) > _MAX_DIMENSIONS:
        raise DecodeError(f"an array has no possible shape: {str(shape)[:200]}")
    if math.prod(max(size, 1) for size in sizes) * itemsize >= _MAX_NBYTES:
        raise DecodeError(f"an array of shape {sizes} is larger than any memory")
    if math.prod(sizes) * itemsize != nbytes:
        raise DecodeError(f"an array of shape {sizes}, {itemsize} bytes each, came with {nbytes} bytes")
    return sizes


def make_number(name: str, payload: bytes) -> np.generic:
    """A numpy scalar.

    Raises:
        DecodeError: when the bytes are not one such number.
    """
    dtype = NUMBERS[name]
    _check_shape((), dtype.itemsize, len(payload))
    number: np.generic = np.frombuffer(payload, dtype)[0]
    return number


def make_array(name: str, shape: Sequence[object], payload: Payload, borrow: bool) -> np.ndarray[Any, Any]:
    """An array over `payload`, or over a copy.

    Raises:
        DecodeError: when the bytes are not such an array.
    """
    dtype = NUMBERS[name]
    sizes = _check_shape(shape, dtype.itemsize, len(payload))
    if borrow:
        return np.frombuffer(payload.view(), dtype).reshape(sizes)
    array = np.empty(sizes, dtype)
    payload.copy_into(array.reshape(-1).view(np.uint8).data)
    return array


def make_tensor(name: str, shape: Sequence[object], payload: Payload, borrow: bool) -> torch.Tensor:
    """A tensor on the CPU over `payload`, or over memory of its own.

    Raises:
        DecodeError: when the bytes are not such a tensor.
    """
    dtype = TENSOR_DTYPES[name]
    sizes = _check_shape(shape, dtype.itemsize, len(payload))
    if borrow and len(payload):
        flat = torch.frombuffer(payload.view(), dtype=torch.uint8)
    else:
        flat = torch.empty(len(payload), dtype=torch.uint8, device="cpu")
        payload.copy_into(flat.numpy().data)
    return flat.view(dtype).reshape(sizes)

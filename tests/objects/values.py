"""Values that may travel, and whether what arrives is the same to the type."""

import collections
import dataclasses
import enum
import math
from typing import NamedTuple

import hypothesis.strategies as st
import msgspec
import numpy as np
import torch

from tcomm.objects.arrays import NUMBERS, TENSOR_DTYPES, TORCH_DTYPES
from tcomm.objects.codec import ErrorText, register


@register
class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


@register
class Word(str, enum.Enum):  # noqa: UP042 - a mixin whose __getitem__ is not the enum's
    YES = "y"


@register
@dataclasses.dataclass
class Point:
    x: object
    y: object = None


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Positive:
    number: int

    def __post_init__(self):
        if not self.number > 0:
            raise ArithmeticError("not positive")


@register
class Request(msgspec.Struct):
    method: str
    args: tuple = ()


@register
class Pair(NamedTuple):
    left: object
    right: object = 2


register(collections.OrderedDict)


def same(a, b):
    """Whether two values are equal and of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and _bytes(a) == _bytes(b)
    if isinstance(a, (np.ndarray, np.generic)):
        return (a.dtype, a.shape, a.dtype.char) == (
            b.dtype,
            b.shape,
            b.dtype.char,
        ) and a.tobytes() == b.tobytes()
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, (set, frozenset)):
        return a == b and all(any(same(x, y) for y in b) for x in a)
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    if isinstance(a, msgspec.Struct):
        return same(msgspec.structs.astuple(a), msgspec.structs.astuple(b))
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)
    return a == b


def _bytes(tensor):
    dense = tensor.resolve_conj().resolve_neg().contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).tolist()


def _some_of(dtype, shape):
    count = math.prod(shape) * dtype.itemsize
    return (torch.arange(count) % 2).to(torch.uint8).view(dtype).reshape(shape)


EXAMPLES = [
    None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64, -(2**64), 255**90, -(2**63) - 1,
    0.0, -0.0, 1.5, math.inf, math.nan, "", "x", "é", "\ud800", "a\x00b", "y" * 9000,
    b"", b"x", b"z" * 70_000, bytearray(), bytearray(b"abc"),
    [], (), {}, set(), frozenset(), [1, (2, {3}), [[4]]], (1,), ((),), {"a": {"b": [None]}},
    {1: 2, (1, 2): 3, None: 4, 2.5: 5, b"k": 6, frozenset([1]): 7, "\udfff": 8}, {True: 1, "1": 2},
    {1, "x", (2, 3), None, 2**70},
    frozenset([1.5, (1,)]), [2**70, "\ud801", 3], {"a": 2**70, "b": b"q" * 65537},
    np.float64(1.5), np.longlong(3), np.int64(3), np.bool_(True), np.longdouble(1.25), np.complex64(1j),
    np.arange(6.0).reshape(2, 3)[:, ::2], np.arange(6).reshape(2, 3).T, np.array(3.5), np.zeros((0, 3)),
    np.arange(3, dtype=">i4"), np.array([True, False]), np.float32(2.0),
    torch.tensor(4), torch.zeros(0, 4), torch.arange(6.0).reshape(2, 3).t(), torch.arange(8)[::2],
    torch.arange(8)[::8], np.arange(8)[::8],
    torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag, torch.ones(2).expand(3, 2),
    torch.float16, torch.bfloat16, torch.qint8,
    torch.device("cuda:1"), torch.device("cpu"), torch.device("meta"),
    torch.Size([]), torch.Size([2, 3]), [torch.ones(3), b"w" * 65537, np.ones(2), bytearray(70)],
    Colour.RED, Word.YES, Point(1, [np.ones(2)]), Positive(number=3), Request("run", (1, [2])), Pair(1, (3,)),
    collections.OrderedDict(b=1, a=(2,)), ErrorText.of(KeyError("k")),
    {"a": Point(Point(1, ()), {Colour.BLUE})},
]  # fmt: skip
EVERY_NUMBER = [np.zeros(3, dtype) + 1 for dtype in NUMBERS.values()]
EVERY_DTYPE = list(TORCH_DTYPES.values())
EVERY_TENSOR = [_some_of(dtype, shape) for dtype in TENSOR_DTYPES.values() for shape in ((), (2, 3), (0,))]

_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=8),
    st.binary(max_size=8),
    st.sampled_from([2**64, "\ud800", np.float32(1), np.int8(-1), torch.int8, torch.Size([3])]),
)  # fmt: skip
_keys = st.one_of(
    st.integers(), st.text(max_size=4), st.tuples(st.integers(), st.text(max_size=2)), st.binary(max_size=3),
    st.frozensets(st.integers(), max_size=2), st.sampled_from(Colour),
)  # fmt: skip
_leaves = st.one_of(
    _scalars,
    st.binary(max_size=8).map(bytearray),
    st.sets(_keys, max_size=3),
    st.sampled_from([value for value in EXAMPLES if isinstance(value, (np.ndarray, torch.Tensor, bytes))]),
)
values = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(_keys, inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=12,
)
"""Anything that may travel."""

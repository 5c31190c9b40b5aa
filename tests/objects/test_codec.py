import collections
import contextlib
import dataclasses
import enum
import gc
import itertools
import os
import pickle
import signal
import struct
import time
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import torch

from tcomm.errors import ConfigError, DecodeError, PeerLostError, PeerTimeoutError
from tcomm.objects import codec, registry
from tcomm.objects.codec import (
    MAX_DEPTH,
    MAX_NBYTES,
    NOT_FLAT,
    ErrorText,
    decode,
    decode_flat,
    encode,
    encode_flat,
    encode_tagged,
    register,
    rehearse,
)
from tcomm.objects.layout import HEAD
from tests.objects import values
from tests.objects.coming import Coming
from tests.objects.handling import handling
from tests.objects.values import EXAMPLES, Colour, Point, Positive, same

QUICK = hypothesis.settings(max_examples=150, deadline=None, database=None)
FACTOR, FLOOR = 600, 200_000
"""Memory that decoding may take: a multiple of the message, and what an error costs."""


def _structure(tree, sizes=(), payload=b""):
    """A message as `docs/objects.md` describes it, made by hand."""
    body = msgspec.msgpack.encode([list(sizes), tree])
    head = struct.pack("<BBHI", 0xC1, 1, 0, len(body)) + body
    return head + bytes(-len(head) % 64 if sizes else 0) + payload


def _marked(tree, payload=b""):
    """As `_structure`, with marks."""
    body = msgspec.msgpack.encode(tree)
    head = struct.pack("<BBHI", 0xC1, 1, 1, len(body)) + body
    return head + (bytes(-len(head) % 64) + payload if payload else b"")


def _mark(tag, nbytes):
    return msgspec.msgpack.Ext(tag, msgspec.msgpack.encode(nbytes))


@pytest.mark.parametrize("borrow", [False, True])
def test_what_comes_out_is_what_went_in_to_the_type(borrow):
    for value in [*EXAMPLES, *values.EVERY_NUMBER, *values.EVERY_DTYPE, *values.EVERY_TENSOR]:
        message = bytearray(encode(value).join())
        assert same(decode(message, borrow=borrow), value), (value, bytes(message[:99]))
    assert same(decode(memoryview(message)), value)


@pytest.mark.parametrize("piece", [64, 4096, 1 << 20])
def test_a_message_is_read_while_it_comes_and_nothing_of_it_before(piece):
    large = bytes(range(256)) * 300
    array = np.arange(9999, dtype=">i4").reshape(99, 101)
    long_structures = [{"s": "x" * 9000, "b": large}, ["x" * 9000, (large,)]]
    mixed = [bytearray(large), {"a": array, "b": large}]
    for value in [large, mixed, torch.arange(5000), "x" * 5000, (), 1, *long_structures]:
        coming = Coming(encode(value).join(), piece)
        assert same(decode(coming.data, arrived=coming.arrived), value)
    coming = Coming(encode(large).join()[:-1], piece)
    with pytest.raises(DecodeError, match="says that it has"):
        decode(coming.data, arrived=coming.arrived)

    # The padding before a buffer without bytes, too: before the last byte the message may be given up.
    coming = Coming(encode([large + b"1", np.empty(0)]).join(), piece)
    assert len(decode(coming.data, arrived=coming.arrived)) == 2
    assert max(coming.asked) == len(coming.data)

    def lose(nbytes):
        raise PeerLostError(f"the writer died before byte {nbytes}")

    for value, byte in ((large, 8), (1, 1)):
        with pytest.raises(PeerLostError, match=f"before byte {byte}"):
            decode(encode(value).join(), arrived=lose)


@QUICK
@hypothesis.given(values.values)
def test_generated_values_come_out_as_they_went_in(value):
    encoded = encode(value)
    message = encoded.join()
    assert len(message) == encoded.nbytes
    assert same(decode(message), value)


def test_same_tells_types_apart():
    pairs = [(1, True), ((1,), [1]), (np.float32(1), 1.0), (b"", bytearray()), (0.0, -0.0), ({1}, {True})]
    assert not [pair for pair in pairs if same(*pair)]
    assert not same(np.longlong(1), np.int64(1))
    assert not same(torch.ones(1), torch.ones(1, 1))


def test_buffers_go_to_keys_and_values_in_their_order():
    value = {b"k" * 70_000: b"v" * 80_000, ("x", b"l" * 70_001): bytearray(b"w")}
    assert decode(encode(value).join()) == value


def test_dict_order_stays_and_shared_objects_come_apart():
    shared = [1]
    out = decode(encode({"b": shared, "a": shared, 3: ()}).join())
    assert list(out) == ["b", "a", 3]
    assert out["a"] is not out["b"]


def test_a_tensor_arrives_on_the_cpu_unless_told_otherwise():
    on_meta = _structure([12, "float32", "meta", [2]], [8], bytes(8))
    assert decode(on_meta).device.type == "cpu"
    assert decode(on_meta, device=torch.device("meta")).device.type == "meta"
    assert decode(on_meta, device=torch.device("cuda:1")).device.type == "cpu"
    assert b"cpu" in encode(torch.ones(1)).join()


def test_a_copy_lives_on_its_own_and_a_borrowed_view_does_not():
    arrays = {"a": np.arange(4), "t": torch.arange(4)}
    message = bytearray(encode(arrays).join())
    copied, borrowed = decode(message), decode(message, borrow=True)
    first = message.rindex((3).to_bytes(8, "little")) - 24
    message[first] = 9
    assert copied["t"].tolist() == [0, 1, 2, 3]
    assert borrowed["t"].tolist() == [9, 1, 2, 3]
    copied["a"][0] = copied["t"][0] = 7
    with pytest.raises(ConfigError, match="borrow=True needs writable memory"):
        decode(bytes(message), borrow=True)


def test_payloads_are_aligned_and_large_ones_are_not_copied():
    array, tensor, block = np.ones((300, 300)), torch.ones(100_001, dtype=torch.uint8), bytes(100_000)
    odd = np.ones(3, np.int8)
    tracemalloc.start()
    encoded = encode([odd, array, tensor, block, "x" * 7])
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 20_000
    for owner in (array, tensor.numpy(), np.frombuffer(block, np.uint8)):
        assert any(np.shares_memory(owner, np.frombuffer(part, np.uint8)) for part in encoded.parts)
    memory = np.zeros(encoded.nbytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    encoded.write_into(memory[begin:].data)
    out = decode(memory[begin:].data[: encoded.nbytes], borrow=True)
    assert [x.ctypes.data % 64 for x in (out[0], out[1])] == [0, 0]
    assert out[2].data_ptr() % 64 == 0
    assert bytes(memory[begin:].data[: encoded.nbytes]) == encoded.join() == b"".join(encoded.parts)


@pytest.mark.parametrize("wrap", [lambda buffers: {"b": buffers[0], "c": buffers[1]}, tuple])
def test_a_message_with_buffers_has_a_head_of_whole_lines_and_no_empty_part(wrap):
    for first, second, sizes in [
        (100_000, 70_001, [100_000, 32, 70_001]),
        (70_016, 70_016, [70_016, 70_016]),
    ]:
        head, *rest = encode(wrap([bytes(first), bytes(second)])).parts
        assert len(head) == 64
        assert list(map(len, rest)) == sizes
    assert list(map(len, encode(bytearray()).parts)) == [64]


@pytest.mark.parametrize("value", [np.arange(30_000), {"data": bytes(100_000)}])
def test_a_head_that_has_come_is_not_waited_for_again(value):
    coming = Coming(encode(value).join(), 1 << 16)
    assert same(decode(coming.data, arrived=coming.arrived), value)
    head, after, *_ = coming.asked
    assert head == HEAD.size
    assert after > 64


def test_a_rehearsal_goes_the_way_of_a_long_message_and_copies_next_to_nothing(monkeypatch):
    read, inner = [], codec.decode_marked

    def read_marked(data, *args):
        read.append((len(data), inner(data, *args)))

    monkeypatch.setattr(codec, "decode_marked", read_marked)
    rehearse()
    assert read == [(65, {"": b"1"})]


def test_a_flat_message_is_what_encode_makes_and_there_is_none_of_other_values():
    for value in [1, "x", b"y" * 65536, {"a": [1, b"z"], None: 2.5}]:
        assert encode_flat(value) == encode(value).join()
    loop = []
    loop.append(loop)
    for value in [(), b"y" * 65537, 2**70, "\ud801", [np.ones(1)], print, loop]:
        assert encode_flat(value) is None
    assert (encode_flat([[]], 2), encode_flat([[]], 1)) == (b"\x91\x90", None)


def test_a_flat_message_is_read_by_itself_and_everything_else_is_left_to_decode():
    for value in [1, None, "x", b"y" * 65536, {"a": [1, b"z"], None: 2.5}, [[[]]]]:
        got = decode_flat(memoryview(encode_flat(value)))
        assert type(got) is type(value)
        assert got == value
    structured = encode({"a": (1, 2)}).join()
    damaged = [encode_flat({"a": [1, 2]})[:-1], encode_flat(1) + b"\0", b"", b"\xc1", b"\xa1\xff"]
    extension = msgspec.msgpack.encode([msgspec.msgpack.Ext(5, b"x")])
    for message in [structured, *damaged, extension]:
        assert decode_flat(memoryview(message)) is NOT_FLAT
    deep = b"\x91" * 100_000 + b"\x01"
    assert decode_flat(memoryview(deep)) is NOT_FLAT


def test_whatever_the_bytes_a_flat_message_is_what_decode_says_or_is_left_to_it():
    told = collections.Counter()
    for first, second, tail in itertools.product(range(256), range(0, 256, 3), (b"", b"\xff" + bytes(12))):
        data = bytes([first, second]) + tail
        flat = decode_flat(memoryview(data))
        try:
            value = decode(data)
        except DecodeError:
            told["refused"] += 1
        else:
            assert repr(flat) == repr(value)
            told["read"] += 1
    assert min(told.values()) > 100


class _AlarmError(ValueError):
    pass


def _raise_alarm(*_):
    raise _AlarmError


def test_what_a_signals_handler_raises_while_a_flat_message_is_read_is_not_taken_for_a_bad_message():
    message, raised = memoryview(encode_flat(list(range(50_000)))), 0
    with handling(signal.SIGALRM, _raise_alarm):
        try:
            for _ in range(20):
                with contextlib.suppress(_AlarmError):
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 1e-4)
                        assert decode_flat(message) is not NOT_FLAT
                        time.sleep(1)
                    except _AlarmError:
                        raised += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    assert raised == 20


@pytest.mark.parametrize("value", [np.arange(9), {"data": bytes(70_000)}, "plain"])
def test_what_a_signals_handler_raises_while_a_message_is_read_is_not_taken_for_a_bad_message(value):
    message = encode(value).join()

    def interrupted(nbytes):
        signal.raise_signal(signal.SIGALRM)
        return nbytes

    with handling(signal.SIGALRM, _raise_alarm), pytest.raises(_AlarmError):
        decode(message, arrived=interrupted)
    with pytest.raises(DecodeError, match="no message: _AlarmError"):
        decode(message, arrived=_raise_alarm)


def _raise_overflow(*_):
    raise OverflowError("of the caller")


def _interrupt(*_):
    signal.raise_signal(signal.SIGALRM)


@pytest.mark.parametrize(
    ("step", "value"),
    [
        ("codec.is_plain", [1]),
        ("marked.is_plain", [bytes(100_000)]),
        ("codec.encode_plain", np.arange(2)),
    ],
)
def test_what_a_signals_handler_raises_while_a_message_is_made_is_not_lost(monkeypatch, step, value):
    monkeypatch.setattr(f"tcomm.objects.{step}", _interrupt)
    with handling(signal.SIGALRM, _raise_overflow), pytest.raises(OverflowError, match="of the caller"):
        encode(value)


@register
@dataclasses.dataclass
class Interrupted:
    x: int

    def __post_init__(self):
        if self.x:
            _interrupt()


def _lose_peer(*_):
    raise PeerLostError("of the caller")


def test_what_a_signals_handler_raises_in_a_constructor_is_not_taken_for_the_constructors():
    value = Interrupted(0)
    value.x = 1
    message = encode(value).join()
    with handling(signal.SIGALRM, _lose_peer), pytest.raises(PeerLostError, match=r"^of the caller"):
        decode(message)


def test_write_into_needs_room():
    encoded = encode([1, 2, 3])
    room = bytearray(5)
    encoded.write_into(memoryview(room))
    assert room == encoded.join() + b"\0"
    with pytest.raises(ConfigError, match="the message has 4 bytes, and 3 were given for it"):
        encoded.write_into(memoryview(bytearray(3)))


class _Level(enum.IntEnum):
    HIGH = 3


class _Unregistered(msgspec.Struct):
    x: int


class _Marked(torch.Tensor):
    pass


class _Text(str):
    __slots__ = ()


NESTED = []
NESTED.append({"again": NESTED})
REFUSED = [
    ({"a": [0, {"x": object()}]}, r"value['a'][1]['x'] is a object, which may not travel"),
    ([Point(1, {(print, 2)})], r"value[0].y{...}[0] is a builtin_function_or_method, which"),
    ({frozenset([1j]): 0}, r"value.keys(){...} is a complex, which"),
    ([_Level.HIGH], r"value[0] is a tests.objects.test_codec._Level, which may not travel as a int"),
    (collections.Counter(), "value is a collections.Counter, which may not travel as a dict"),
    (_Unregistered(1), "_Unregistered, which may not travel; give plain values"),
    ((1, torch.nn.Parameter(torch.ones(1))), r"value[1] is a torch.nn.parameter.Parameter; a plain tensor"),
    (torch.ones(1).as_subclass(_Marked), "value is a tests.objects.test_codec._Marked; a plain tensor"),
    (torch.ones(1, requires_grad=True), "would be lost; give its .detach()"),
    (torch.ones(2, 2).to_sparse(), "layout torch.sparse_coo; give its .to_dense()"),
    (torch.ones(1, device="meta"), "which has no elements; send its shape"),
    (ValueError("x"), "an exception travels as text: give ErrorText.of(error)"),
    (np.array(["x"]), "value is an array of dtype <U1; only numbers"),
    (np.array([None]), "value is an array of dtype object; only numbers"),
    (np.zeros(2, [("a", "i4")]), "only numbers"),
    (np.ma.zeros(2), "value is a numpy.ma.MaskedArray, which may not travel as a ndarray"),
    (np.datetime64("2020"), "value is a numpy.datetime64, which"),
    (memoryview(b"x"), "value is a memoryview, which"),
    (int, "value is a type, which"),
    (NESTED, "value[0]['again'][0]['again']"),
    (NESTED, "lies more than 64 containers deep, or in itself"),
]


@pytest.mark.parametrize(("value", "told"), REFUSED, ids=range(len(REFUSED)))
def test_what_may_not_travel_is_refused_with_its_place(value, told):
    with pytest.raises(ConfigError) as raised:
        encode(value)
    assert told in str(raised.value)
    assert str(raised.value).startswith("value")


def test_many_dicts_side_by_side_are_no_deeper_and_have_their_own_paths():
    value = [{"a": (index,)} for index in range(100)]
    assert decode(encode(value, max_depth=3).join(), max_depth=3) == value
    value[99]["a"] = (1, {object(): 1})
    with pytest.raises(ConfigError, match=r"^value\[99\]\['a'\]\[1\]\.keys\(\) is a object"):
        encode(value)


def test_a_key_of_a_subclass_of_str_is_refused():
    with pytest.raises(ConfigError, match=r"^value\.keys\(\) is a tests\.objects\.test_codec\._Text, which"):
        encode({_Text("k"): ()})


def _nested(depth, container):
    value = container()
    for _ in range(depth - 1):
        value = [value] if container is list else (value,)
    return value


@pytest.mark.parametrize("container", [list, tuple])
def test_depth_has_a_cap_on_both_sides(container):
    value = _nested(5, container)
    message = encode(value, max_depth=5).join()
    assert decode(message, max_depth=5) == value
    with pytest.raises(ConfigError, match=r"value\[0\]\[0\]\[0\]\[0\] lies more than 4 containers deep"):
        encode(value, max_depth=4)
    with pytest.raises(DecodeError, match="deep"):
        decode(message, max_depth=4)
    with pytest.raises(ConfigError, match="deeper than Python's stack allows"):
        encode(_nested(5000, container), max_depth=10_000)
    assert decode(encode(_nested(MAX_DEPTH, container)).join()) == _nested(MAX_DEPTH, container)


@pytest.mark.parametrize("value", [[1] * 100, (np.zeros(100, np.uint8),)])
def test_size_has_a_cap_on_both_sides(value):
    message = encode(value).join()
    size = len(message)
    assert same(decode(encode(value, max_nbytes=size).join(), max_nbytes=size), value)
    with pytest.raises(ConfigError, match=f"the message has {size} bytes, more than max_nbytes={size - 1}"):
        encode(value, max_nbytes=size - 1)
    with pytest.raises(DecodeError, match=f"a message of {size} bytes is longer than max_nbytes={size - 1}"):
        decode(message, max_nbytes=size - 1)
    assert MAX_NBYTES == 2**32


HUGE = 2**60
HOSTILE = {
    "nothing": b"",
    "pickle": pickle.dumps({"a": 1}),
    "list of 2^32": b"\xdd\xff\xff\xff\xff",
    "map of 2^32": b"\xdf\xff\xff\xff\xff",
    "text of 2^32": b"\xdb\xff\xff\xff\xff",
    "bytes of 2^32": b"\xc6\xff\xff\xff\xff",
    "lists in lists": b"\x91" * 200_000 + b"\xc0",
    "long lists in long lists": b"\xdd\x00\x0f\xff\xff" * 900,
    "maps in maps": b"\x81\xc0" * 100_000 + b"\xc0",
    "tags in tags": _structure([1, *[0] * 3])[:8] + b"\x92\x01" * 50_000,
    "tuples in tuples": _structure(_nested(300, list)),
    "a date": b"\xd6\xff\0\0\0\0",
    "a date inside": _structure([0, msgspec.Raw(b"\xd6\xff\0\0\0\0")]),
    "an extension": b"\xd6\x05\0\0\0\0",
    "an extension inside": _structure(msgspec.Raw(b"\xd6\x05\0\0\0\0")),
    "a map inside": _structure({"a": 1}),
    "no text": b"\xa1\xff",
    "more than one value": b"\x01\x01",
    "a tuple as a key": b"\x81\x91\x01\x00",
    "only a mark": b"\xc1",
    "another version": b"\xc1\x02\0\0\x03\0\0\0\x92\x90\xc0",
    "what is zero is not": b"\xc1\x01\0\x01\x03\0\0\0\x92\x90\xc0",
    "a longer structure": b"\xc1\x01\0\0\xff\xff\xff\xff\x92\x90\xc0",
    "an array of 2^60": _structure([10, "<f4f", [HUGE]], [16], bytes(16)),
    "an array of 2^60 that has a place": _structure([10, "|u1B", [HUGE]], [HUGE], bytes(16)),
    "an array that overflows": _structure([10, "<f4f", [2**32, 2**32, 2**32]], [0]),
    "an empty array that overflows": _structure([10, "<f4f", [2**61, 2**61, 0]], [0]),
    "an array of less than nothing": _structure([10, "<f4f", [-1, -4]], [16], bytes(16)),
    "an array of True": _structure([10, "|u1B", [True]], [1], b"x"),
    "an array of 65 dimensions": _structure([10, "|u1B", [1] * 65], [1], b"x"),
    "an array of objects": _structure([10, "|O8O", [2]], [16], bytes(16)),
    "a tensor of 2^60": _structure([12, "float32", "cpu", [HUGE]], [16], bytes(16)),
    "a tensor that overflows": _structure([12, "float32", "cpu", [2**61, 2**61, 0]], [0]),
    "a quantised tensor": _structure([12, "qint8", "cpu", [1]], [1], b"x"),
    "half a tensor": _structure([12, "float32", "cpu", [2]], [4], bytes(4)),
    "a number too long": _structure([11, "<f4f", bytes(8)]),
    "a buffer less": _structure([9]),
    "a buffer too many": _structure(None, [4], bytes(4)),
    "one buffer twice": _structure([1, [9], [9]], [4], bytes(4)),
    "a buffer of -1": _structure([9], [-1]),
    "a buffer of True": _structure([9], [True], b"x"),
    "bytes behind": _structure([9], [4], bytes(5)),
    "an unknown tag": _structure([99]),
    "a list as a tag": _structure([[1]]),
    "no tag": _structure([]),
    "a key without a value": _structure([3, "a"]),
    "a key twice": _structure([3, "a", 1, "a", 2]),
    "a list as an element": _structure([4, [1]]),
    "an element twice": _structure([5, 1, 1]),
    "an integer from text": _structure([6, "x"]),
    "a dtype that is a function": _structure([13, "load"]),
    "a device of nowhere": _structure([14, "nowhere", None]),
    "a device of a large number": _structure([14, "cuda", HUGE]),
    "a size of text": _structure([15, "x"]),
    "a class by name": _structure([16, "subprocess.Popen", 0, "true"]),
    "marks: a date": _marked([msgspec.Raw(b"\xd6\xff\0\0\0\0"), _mark(8, 1)], b"x"),
    "marks: an extension": _marked([msgspec.msgpack.Ext(5, b"1234")]),
    "marks: a bytearray": _marked([_mark(9, 1)], b"x"),
    "marks: a tuple": _marked([_mark(2, 0)]),
    "marks: no number": _marked([_mark(8, "x")], b"x"),
    "marks: nothing": _marked([msgspec.msgpack.Ext(8, b"")], b"x"),
    "marks: no msgpack": _marked([msgspec.msgpack.Ext(8, b"\xc1")], b"x"),
    "marks: a list": _marked([_mark(8, [1])], b"x"),
    "marks: bytes of -1": _marked([_mark(8, -1)], b"x"),
    "marks: bytes of True": _marked([_mark(8, True)], b"x"),
    "marks: bytes of 2^60": _marked([_mark(8, HUGE)], b"x"),
    "marks: bytes too long": _marked([_mark(8, 2)], b"x"),
    "marks: bytes behind": _marked([_mark(8, 1)], b"xy"),
    "marks: a buffer less": _marked([_mark(8, 1)]),
    "marks: a buffer too many": _marked([1], b"x"),
    "marks: one buffer twice": _marked([_mark(8, 1), _mark(8, 1)], b"x"),
    "marks: lists in lists": _marked(msgspec.Raw(b"\x91" * 200_000 + b"\xc0")),
    "marks: too deep": _marked(_nested(65, list)),
    "marks: no container": _marked(_mark(8, 1), b"x"),
    "marks: bytes as a key": _marked({b"k": 1}),
    "marks: bytes of bytes": _marked({b"k": _mark(8, 1)}, b"x"),
    "marks: bytes of 2^33": _marked([_mark(8, 2**33)], b"x"),
    "marks: a buffer as a key": _marked(msgspec.Raw(b"\x81\xc7\x01\x08\x01\xc0"), b"x"),
    "marks: a tuple as a key": _marked(msgspec.Raw(b"\x81\x91\x01\x00")),
    "marks: a longer structure": b"\xc1\x01\1\0\xff\xff\xff\xff\x90",
    "marks: two values": b"\xc1\x01\1\0\2\0\0\0\x90\x90",
    "marks: forth and back": _marked([_mark(8, 4096), _mark(8, -4096), _mark(8, 4096)], bytes(4096)),
    "another form": b"\xc1\x01\2\0\3\0\0\0\x92\x90\xc0",
    "another form of marks": b"\xc1\x01\2\0\1\0\0\0\x90",
    "no tree": b"\xc1\x01\0\0\x02\0\0\0\x91\x90",
    "a tree of another kind": b"\xc1\x01\0\0\x01\0\0\0\x05",
}  # fmt: skip


def _peak_while_decoding(message, borrow=False, arrived=None):
    """Bytes that decoding takes at most, and what it raises."""
    tracemalloc.start()
    try:
        decode(message, borrow=borrow, arrived=arrived)
        return tracemalloc.get_traced_memory()[1], None
    except Exception as error:
        return tracemalloc.get_traced_memory()[1], error
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_a_decode_error_and_take_no_memory(message):
    for borrow, arrived in ((False, None), (True, None), (False, lambda _: len(message))):
        peak, error = _peak_while_decoding(bytearray(message), borrow, arrived)
        assert type(error) is DecodeError
        assert peak < FLOOR + 20 * len(message)
        assert len(str(error)) < 600


def test_the_messages_that_are_hostile_are_nearly_right():
    assert decode(b"\xc1\x01\0\0\x03\0\0\0\x92\x90\xc0") is None
    assert decode(_structure([10, "<f4f", [4]], [16], bytes(16))).tolist() == [0] * 4
    assert decode(_marked({"k": _mark(8, 1)}, b"x")) == {"k": b"x"}
    assert decode(_marked(msgspec.Raw(b"\x81\xa1k\xc7\x01\x08\x01"), b"x")) == {"k": b"x"}
    assert decode(_marked(_nested(64, list))) == _nested(64, list)
    assert decode(b"\xc1\x01\1\0\1\0\0\0\x90") == []
    with pytest.raises(DecodeError, match="a message of version 2 and form 0; here it is 1, 0 or 1"):
        decode(HOSTILE["another version"])


def test_what_is_no_bytes_at_all_is_said_to_be_no_message():
    with pytest.raises(DecodeError, match="the bytes are no message: TypeError"):
        decode("text")


def _decodes_or_refuses(message):
    with contextlib.suppress(DecodeError):
        decode(message)
    with contextlib.suppress(DecodeError):
        decode(bytearray(message), borrow=True)


@QUICK
@hypothesis.given(st.binary(max_size=200))
def test_random_bytes_are_a_value_or_a_decode_error(message):
    _decodes_or_refuses(message)
    for form in (b"\0", b"\1"):
        body = b"\xc1\x01" + form + b"\0" + len(message).to_bytes(4, "little") + message
        _decodes_or_refuses(body)
        peak, _ = _peak_while_decoding(body)
        assert peak < FLOOR + FACTOR * len(body)


_trees = st.recursive(
    st.one_of(
        st.none(), st.integers(-2, 20), st.binary(max_size=9), st.sampled_from(["<f4f", "float32", "cpu", ""])
    ),
    lambda inner: st.builds(lambda tag, rest: [tag, *rest], st.integers(0, 18), st.lists(inner, max_size=4)),
    max_leaves=12,
)


@QUICK
@hypothesis.given(_trees, st.lists(st.integers(-1, 70), max_size=3))
def test_random_structures_are_a_value_or_a_decode_error(tree, sizes):
    _decodes_or_refuses(_structure(tree, sizes, bytes(sum(-(-max(size, 0) // 64) * 64 for size in sizes))))


_marks = st.builds(
    _mark, st.one_of(st.just(8), st.integers(-2, 18)), st.one_of(st.integers(-1, 70), st.just([1]))
)


@QUICK
@hypothesis.given(
    st.recursive(
        st.one_of(st.none(), st.integers(-2, 20), st.binary(max_size=9), _marks),
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.sampled_from("abc"), inner)),
        max_leaves=12,
    ),
    st.binary(max_size=200),
)
def test_random_marks_are_a_value_or_a_decode_error(tree, payload):
    _decodes_or_refuses(_marked(tree, payload))


@QUICK
@hypothesis.given(st.sampled_from(EXAMPLES), st.data())
def test_altered_messages_are_a_value_or_a_decode_error(value, data):
    message = bytearray(encode(value).join())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(message)))
        message[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    _decodes_or_refuses(bytes(message))
    peak, _ = _peak_while_decoding(bytes(message))
    assert peak < FLOOR + FACTOR * len(message)


def test_the_limit_of_a_classs_own_making_is_a_decode_error():
    message = encode(Positive(number=5)).join()
    with pytest.raises(DecodeError, match="ArithmeticError: not positive"):
        decode(message.replace(b"\x05", b"\x00"))
    with pytest.raises(DecodeError, match="came with 0 fields and has 1"):
        decode(_structure(msgspec.msgpack.decode(message[8:])[1][:-1]))
    with pytest.raises(DecodeError, match="KeyError"):
        decode(encode(Colour.RED).join().replace(b"RED", b"RUN"))


def test_an_error_of_a_classs_own_making_is_never_taken_for_one_of_the_wait(monkeypatch):
    def refuse(_):
        raise PeerTimeoutError("not now")

    message = encode(Positive(number=5)).join()
    monkeypatch.setattr(Positive, "__post_init__", refuse)
    with pytest.raises(DecodeError, match="PeerTimeoutError: not now"):
        decode(message)


def test_a_receiver_that_lacks_the_class_or_has_another_says_so(monkeypatch):
    name = "tests.objects.values.Point"
    message = encode([Point(1)]).join()
    _, fingerprint = registry.find_registered(Point)
    with pytest.raises(DecodeError, match=f"received a {name} of other fields than x, y, which it has here"):
        decode(message.replace(fingerprint.to_bytes(8, "big"), bytes(8)))
    monkeypatch.delitem(registry._by_name, name)
    with pytest.raises(DecodeError, match=f"received a '{name}', which is not registered here; call tcomm"):
        decode(message)


def test_no_code_runs_and_nothing_stays(tmp_path):
    mark = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(DecodeError):
            decode(pickle.dumps(Attack(), protocol))
    assert not mark.exists()
    message = encode([np.ones(1000), (1, 2)]).join()[:-1]
    for _ in range(3):
        with contextlib.suppress(DecodeError):
            decode(message)
    gc.collect()
    tracemalloc.start()
    for _ in range(100):
        with contextlib.suppress(DecodeError):
            decode(message)
    gc.collect()
    assert tracemalloc.get_traced_memory()[0] < 4000
    tracemalloc.stop()


def test_errors_travel_as_text_and_register_is_the_same_here():
    error = decode(encode(ErrorText.of(ValueError("too large"))).join())
    assert str(error) == "ValueError: too large"
    assert register(Point) is Point


def test_small_objects_are_fast():
    value = {"a": 1, "b": "x", "ids": [1, 2, 3], "t": 1.5}
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(200):
            decode(encode(value).join())
        best = min(best, time.perf_counter() - started)
    # About 2 us on the machine it was written on: an order of magnitude is a mistake and not a slow machine.
    assert best / 200 < 20e-6


def test_a_value_that_was_found_not_to_be_plain_is_encoded_as_otherwise():
    for value in EXAMPLES:
        encoded = encode_tagged(value)
        assert same(decode(encoded.join()), value)
        if encode_flat(value) is None:
            assert encoded.join() == encode(value).join()
    with pytest.raises(ConfigError, match="more than max_nbytes=70000"):
        encode_tagged(bytes(70_000), max_nbytes=70_000)
    with pytest.raises(ConfigError, match="more than 3 containers deep"):
        encode_tagged(_nested(4, tuple), max_depth=3)
    with pytest.raises(ConfigError, match="deeper than Python's stack allows"):
        encode_tagged(_nested(9999, tuple), max_depth=10_000)

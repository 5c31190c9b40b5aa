import collections
import dataclasses
import enum
from typing import NamedTuple

import msgspec
import pytest

from tcomm.errors import ConfigError, DecodeError
from tcomm.objects.registry import ErrorText, Registered, find_registered, register, registered_named


@register
@dataclasses.dataclass
class Box:
    width: int
    height: int


class Suit(enum.Enum):
    HEARTS = 1


class Late(NamedTuple):
    when: float


class One(msgspec.Struct):
    x: int


def test_a_registered_class_is_found_by_itself_and_by_its_name():
    assert register(Box) is Box
    entry, fingerprint = find_registered(Box)
    assert (entry.cls, entry.fields) == (Box, ("width", "height"))
    assert entry.name == "tests.objects.test_registry.Box"
    assert list(entry.take(Box(1, 2))) == [1, 2]
    assert entry.make(1, 2) == Box(1, 2)
    assert registered_named(entry.name, fingerprint) is entry
    assert find_registered(int) is None
    with pytest.raises(
        DecodeError, match=r"received a 'os\.system', which is not registered here; call tcomm"
    ):
        registered_named("os.system", 0)
    with pytest.raises(
        DecodeError, match="of other fields than width, height, which it has here; run the same"
    ):
        registered_named(entry.name, fingerprint + 1)


def test_the_fingerprint_is_of_names_and_fields():
    def fingerprint(name="a", fields=("x", "y"), members=()):
        return Registered(object, name, fields, list, list, members).fingerprint

    others = [
        fingerprint("b"),
        fingerprint(fields=("y", "x")),
        fingerprint(members=("x",)),
        fingerprint(fields=("x",)),
    ]
    assert len({fingerprint(), *others}) == 5
    # It is on the wire: it may not change.
    assert fingerprint() == 6629882396927906185


def test_each_kind_is_taken_apart_and_made_again():
    for value in (Suit.HEARTS, Late(1.5), One(3), collections.OrderedDict(a=1)):
        register(type(value))
        entry, _ = find_registered(type(value))
        again = entry.make(*entry.take(value))
        assert again == value
        assert type(again) is type(value)
    assert find_registered(Suit)[0].members == ("HEARTS",)


def _takes_less():
    @dataclasses.dataclass
    class Cached:
        x: int
        y: int = dataclasses.field(init=False, default=0)

    return Cached


def _takes_more():
    @dataclasses.dataclass
    class Seeded:
        x: int
        seed: dataclasses.InitVar[int] = 0

    return Seeded


def _is_a_dict():
    @dataclasses.dataclass
    class Table(dict):
        x: int = 0

    return Table


class _Flags(enum.Flag):
    A = 1


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (int, "builtins.int cannot be registered: it is no dataclass"),
        (_Flags, "it is no dataclass, msgspec.Struct, NamedTuple or plain Enum"),
        (_is_a_dict(), "it is no dataclass"),
        (_takes_less(), "its fields are x, y, its constructor takes others; leave init=False"),
        (_takes_more(), "its fields are x, its constructor takes others"),
    ],
)
def test_what_would_not_arrive_whole_is_not_registered(cls, told):
    with pytest.raises(ConfigError, match=told):
        register(cls)
    assert find_registered(cls) is None


def test_two_classes_of_one_name_are_refused():
    other = dataclasses.make_dataclass("Box", ["x"], namespace={"__module__": __name__})
    with pytest.raises(
        ConfigError, match=r"another class named tests.objects.test_registry.Box is registered"
    ):
        register(other)


def test_an_exception_becomes_text():
    text = ErrorText.of(ValueError("too large"))
    assert (text.kind, text.text, str(text)) == ("ValueError", "too large", "ValueError: too large")
    assert find_registered(ErrorText)[0].fields == ("kind", "text")

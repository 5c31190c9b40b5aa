"""Groups by name: names that nobody had, groups that are gone."""

import gc

import pytest

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.compiled.registry import find_group, living_groups, next_number, register, unique_name
from tests.groups.compiled.groups import Alone


def test_names_count_from_zero_for_each_base():
    assert [unique_name("test-a") for _ in range(3)] == ["test-a:0", "test-a:1", "test-a:2"]
    assert unique_name("test-b") == "test-b:0"


def test_the_next_number_is_told_and_not_taken():
    assert next_number("test-c") == next_number("test-c") == 0
    assert unique_name("test-c", at_least=4) == "test-c:4"
    assert next_number("test-c") == 5


def test_a_group_is_found_while_somebody_holds_it():
    group = Alone()
    assert find_group(group.unique_name) is group
    assert group in living_groups()
    name = group.unique_name
    del group
    gc.collect()
    with pytest.raises(ConfigError, match=f"^Group {name} is destroyed.$") as raised:
        find_group(name)
    assert isinstance(raised.value, ValueError)
    assert not isinstance(raised.value, AssertionError)


def test_an_unknown_group():
    with pytest.raises(AssertionError, match=r"^Group tp:77 is not found\.$") as raised:
        find_group("tp:77")
    assert isinstance(raised.value, UsageError)


def test_a_destroyed_group_that_is_still_held():
    group = Alone()
    group.destroyed = True
    with pytest.raises(ValueError, match=f"^Group {group.unique_name} is destroyed.$"):
        find_group(group.unique_name)
    assert group not in living_groups()


def test_a_name_belongs_to_one_living_group():
    group, other = Alone(), Alone()
    other.unique_name = group.unique_name
    with pytest.raises(ConfigError, match=f"another group is called '{group.unique_name}'"):
        register(other)
    register(group)
    group.destroyed = True
    register(other)
    assert find_group(group.unique_name) is other

import collections

import pytest
import torch

from tcomm.errors import ConfigError
from tcomm.groups.helpers.names import (
    get_distributed_init_method,
    get_tcp_uri,
    is_torch_equal_or_newer,
    resolve_obj_by_qualname,
    supports_custom_op,
)


@pytest.mark.parametrize("function", [get_tcp_uri, get_distributed_init_method])
def test_an_address_is_written_as_torch_reads_it(function):
    assert function("10.0.0.1", 29500) == "tcp://10.0.0.1:29500"
    assert function("fe80::1", 1) == "tcp://[fe80::1]:1"
    assert function("[::1]", 2) == "tcp://[::1]:2"
    assert function("node-3", 0) == "tcp://node-3:0"
    for port in (-1, 65536, "80", True, None):
        with pytest.raises(ConfigError) as caught:
            function("::1", port)
        assert str(caught.value) == f"port {port!r} is none; ports are 0 to 65535"


def test_a_name_is_found_in_its_module():
    assert resolve_obj_by_qualname("collections.OrderedDict") is collections.OrderedDict
    assert resolve_obj_by_qualname("tcomm.errors.ConfigError") is ConfigError
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        resolve_obj_by_qualname("nowhere_at_all.Thing")
    with pytest.raises(AttributeError, match="NoSuchThing"):
        resolve_obj_by_qualname("tcomm.errors.NoSuchThing")


@pytest.mark.parametrize("name", ["print", "", ".x", "x.", "..x.y"])
def test_a_name_without_a_module_is_refused(name):
    with pytest.raises(ValueError, match="names nothing in a module") as caught:
        resolve_obj_by_qualname(name)
    assert str(caught.value) == (
        f"{name!r} names nothing in a module; give one such as 'package.module.Name'"
    )


@pytest.mark.parametrize(
    ("version", "target", "wanted"),
    [
        ("2.11.0", "2.11.0", True),
        ("2.11.0+cpu", "2.11.0", True),
        ("2.11.0.dev20260101", "2.11.0", False),
        ("2.11.0rc1", "2.11.0", False),
        ("2.9.1", "2.11", False),
        ("2.11.0", "2.9.1", True),
    ],
)
def test_versions_are_compared_as_versions(monkeypatch, version, target, wanted):
    monkeypatch.setattr(torch, "__version__", version)
    assert is_torch_equal_or_newer(target) is wanted


def test_what_is_no_version_is_refused():
    with pytest.raises(ConfigError) as caught:
        is_torch_equal_or_newer("newest")
    assert str(caught.value) == "'newest' is no version; give one such as '2.11.0'"


def test_custom_operators_are_there_where_torch_has_them(monkeypatch):
    assert supports_custom_op() is True
    monkeypatch.delattr(torch.library, "custom_op")
    assert supports_custom_op() is False

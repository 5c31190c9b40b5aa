"""The table of bindings, argument for argument, against the headers that came with the bitcode."""

import functools
import re

import pytest

from tcomm.kernels.device_nvshmem import BINDINGS, CMP_EQ, CMP_GE, SIGNAL_ADD, SIGNAL_SET
from tests.compile_nvshmem.linked import bitcode_of

KINDS = {"size_t": "size", "uint64_t": "word", "int": "int", "void": "none"}


@functools.cache
def headers():
    """All headers in one line each, with the scope of a block put into what macros paste together."""
    include = bitcode_of("sm_90").parent.parent / "include"
    found = sorted([*include.glob("host/*.h"), *include.glob("device_host_transport/*.h")])
    text = "\n".join(path.read_text() for path in found)
    return re.sub(r"##SC_SUFFIX", "_block", re.sub(r"\s*\\\n\s*", " ", text))


def kind_of(declaration):
    """What an argument, or a result, is in the table."""
    if "*" in declaration:
        return "address"
    words = [word for word in declaration.split() if word in KINDS]
    return KINDS[words[0]]


def declared(symbol):
    found = re.search(rf"([\w ]*[\w*]\s*\*?)\b{symbol}\s*\(([^)]*)\)", headers())
    assert found, f"{symbol} is not declared"
    arguments = [argument for argument in found[2].split(",") if argument.strip() not in ("", "void")]
    return tuple(map(kind_of, arguments)), kind_of(found[1])


@pytest.mark.parametrize("binding", BINDINGS, ids=lambda binding: binding.name)
def test_a_binding_is_what_the_header_says(binding):
    assert declared(binding.symbol) == (binding.arguments, binding.result)


def test_another_binding_is_not():
    assert declared("nvshmemx_getmem_block") != (("address", "address", "int"), "none")
    with pytest.raises(AssertionError, match="not declared"):
        declared("nvshmem_no_such_function")


def test_constants_are_those_of_the_header():
    assert f"NVSHMEM_SIGNAL_SET = {SIGNAL_SET.value}, NVSHMEM_SIGNAL_ADD = {SIGNAL_ADD.value} " in headers()
    compared = re.search(r"NVSHMEM_CMP_EQ = (\d+),([^}]*)NVSHMEM_CMP_GE,", headers())
    assert int(compared[1]) == CMP_EQ.value
    assert CMP_EQ.value + 1 + compared[2].count(",") == CMP_GE.value

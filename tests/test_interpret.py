import importlib.util
import os
import subprocess
import sys

import pytest

from tcomm import interpret
from tcomm.errors import CapabilityError
from tcomm.interpret import choose_interpreter, is_interpreted, why_not_runnable


@pytest.fixture
def unset(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(interpret, "_has_gpu", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(interpret, "_has_gpu", lambda: True)


def test_these_tests_are_interpreted():
    assert is_interpreted()
    assert why_not_runnable() == ""


@pytest.mark.usefixtures("unset", "no_gpu")
def test_without_a_gpu_the_interpreter_is_turned_on():
    choose_interpreter()
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.usefixtures("unset", "gpu")
def test_with_a_gpu_kernels_are_compiled():
    choose_interpreter()
    assert "TRITON_INTERPRET" not in os.environ
    assert why_not_runnable() == (
        "kernels are compiled for the GPU here; set TRITON_INTERPRET=1 to interpret them"
    )


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("value", ["0", "off", "False", "no"])
def test_an_explicit_no_is_left_as_it_is(monkeypatch, value):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    choose_interpreter()
    assert os.environ["TRITON_INTERPRET"] == value
    assert why_not_runnable() == f"TRITON_INTERPRET={value} turns the interpreter off"


@pytest.mark.usefixtures("unset", "no_gpu")
def test_triton_that_was_imported_too_early_is_an_error(monkeypatch):
    monkeypatch.setattr(interpret, "is_interpreted", lambda: False)
    assert "triton" in sys.modules
    with pytest.raises(CapabilityError) as caught:
        choose_interpreter()
    assert str(caught.value) == (
        "there is no GPU and Triton was imported before tcomm's kernels without its interpreter; "
        "set TRITON_INTERPRET=1 before the first import of triton"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not_runnable() == "Triton was imported without TRITON_INTERPRET=1"


def test_without_triton_kernels_cannot_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert why_not_runnable() == "Triton is not installed"


def test_a_process_of_its_own_interprets_where_it_has_no_gpu():
    code = (
        "import torch, tcomm.kernels.launch as launch, tcomm.interpret as i; "
        "print(i.is_interpreted() or torch.cuda.is_available(), i.why_not_runnable() or 'ok')"
    )
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("True ")

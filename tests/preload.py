"""What every spawned rank needs, imported and prepared once in the server that they are forked from."""

import gc
import importlib
import os
import pkgutil

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: F401
import triton.compiler.code_generator
import triton.language as tl
import triton.runtime.interpreter

import tcomm.cpu
import tcomm.groups
import tcomm.kernels
import tests.ranks  # noqa: F401
from tests.name_service import use_no_name_server
from tests.quick_interpreter import use_quick_interpreter


def _modules(package):
    """The modules of a package, imported."""
    return [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]


def _rewrite_kernels(modules):
    """Triton's interpreter reads, changes and compiles a function's source before its first call."""
    for module in modules:
        for value in list(vars(module).values()):
            if isinstance(value, triton.runtime.interpreter.InterpretedFunction):
                value.rewrite()


use_no_name_server()
use_quick_interpreter()
_modules(tcomm.groups)
_modules(tcomm.cpu)
tcomm.groups.differences.installed_version()
_rewrite_kernels([tl.standard, *_modules(tcomm.kernels)])

# Ranks share this memory with the server until they write to it, which each garbage collection did.
gc.collect()
gc.freeze()

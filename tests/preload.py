"""What every spawned rank needs, imported once in the server that they are forked from."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: F401

import tcomm.kernels.all_reduce
import tcomm.kernels.point_to_point
import tests.ranks  # noqa: F401
from tests.name_service import use_no_name_server
from tests.quick_interpreter import use_quick_interpreter

assert tcomm.kernels.all_reduce.LAUNCHERS
assert tcomm.kernels.point_to_point.send
use_no_name_server()
use_quick_interpreter()

"""Triton kernels, one file per collective, each kernel above its launcher.

Kernels are compiled where there is a GPU and interpreted where there is none. Triton makes that choice when a
function is decorated, so it is settled here, before any file of this package imports Triton.
"""

from tcomm.interpret import choose_interpreter

choose_interpreter()

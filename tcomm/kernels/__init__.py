"""Triton kernels, one file per collective, each kernel above its launcher.

Kernels are compiled where there is a GPU and interpreted where there is none. The choice is made once,
before the first kernel is decorated; `TRITON_INTERPRET` overrides it.
"""

from tcomm.kernels.interpret import choose_interpreter

choose_interpreter()

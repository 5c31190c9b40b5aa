"""Where ops of torch are defined: the library `tcomm`, and a way to add to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library, infer_schema

__all__ = ["LIBRARY", "check_before_autograd", "direct_register_custom_op"]

LIBRARY = Library("tcomm", "FRAGMENT")
"""Ops live as long as it does."""


def direct_register_custom_op(
    op_name: str,
    op_func: Callable[..., Any],
    mutates_args: Sequence[str] | None = None,
    fake_impl: Callable[..., Any] | None = None,
    target_lib: Library | None = None,
    dispatch_key: str | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> None:
    """Define an op of torch the cheap way: a call costs a fifth of what `torch.library.custom_op` costs.

    Args:
        op_name: without namespace.
        op_func: carries it out; its type hints are the schema. It must not return what it was given.
        mutates_args: names of the arguments that it writes to.
        fake_impl: gives an empty result of the right shape, for compiling.
        target_lib: whose namespace it goes to; `tcomm` where None. The op lives as long as this does.
        dispatch_key: for which tensors; those of any device where None.
        tags: of torch.

    Raises:
        ValueError: from torch, when a type hint is missing or of no type that ops know.
        RuntimeError: from torch, when the op exists.
    """
    library = LIBRARY if target_lib is None else target_lib
    schema = infer_schema(op_func, mutates_args=list(mutates_args or ()))
    library.define(op_name + schema, tags=tags)
    library.impl(op_name, op_func, dispatch_key=dispatch_key or "CompositeExplicitAutograd")
    if fake_impl is not None:
        torch.library.register_fake(f"{library.ns}::{op_name}", fake_impl, lib=library)


def check_before_autograd(op_name: str, check: Callable[..., None]) -> None:
    """Call `check` where autograd would record an op of `LIBRARY`, and torch.func would transform it.

    In the op itself a tensor does not tell any more whose gradient torch.func asks for. Costs a microsecond
    and a half a call, and nothing in inference mode.

    Args:
        op_name: without namespace; it has no gradient.
        check: gets its name, and its tensors; raises where a gradient would be lost.
    """
    op = getattr(getattr(torch.ops, LIBRARY.ns), op_name).default

    def run(keys: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        check(op_name, *(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)

    LIBRARY.impl(op_name, run, "Autograd", with_keyset=True)

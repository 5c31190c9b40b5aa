"""The product of scaled fp8 matrices, reduced over the ranks and scattered.

Here one follows the other; the schema is that of a kernel that does both at once.
"""

from __future__ import annotations

import torch

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.arguments import check_dim, dtype_name
from tcomm.groups.compiled.engines import Engine, find_engine, find_torch_engine
from tcomm.groups.compiled.library import check_before_autograd, direct_register_custom_op
from tcomm.groups.compiled.ops import refuse_gradient

__all__ = ["patched_fused_scaled_matmul_reduce_scatter", "patched_fused_scaled_matmul_reduce_scatter_fake"]


def patched_fused_scaled_matmul_reduce_scatter(  # noqa: PLR0913
    A: torch.Tensor,  # noqa: N803
    B: torch.Tensor,  # noqa: N803
    A_scale: torch.Tensor,  # noqa: N803
    B_scale: torch.Tensor,  # noqa: N803
    reduce_op: str,
    orig_scatter_dim: int,
    scatter_dim_after_maybe_reshape: int,  # noqa: ARG001
    group_name: str,
    output_shape: list[int],
    bias: torch.Tensor | None = None,
    result_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """`(A * A_scale) @ (B * B_scale)`, reduced over the ranks, of which each gets its chunk. **Collective.**

    On a CPU the product is that of the dequantised matrices in fp32, rounded once.

    Args:
        A: fp8 [..., K].
        B: fp8 [K, N].
        A_scale: fp32, one element, or [..., 1] with the leading dimensions of A.
        B_scale: fp32, one element, or [1, N].
        reduce_op: `sum` or `avg`.
        orig_scatter_dim: of `output_shape`, along which the result is scattered.
        scatter_dim_after_maybe_reshape: the same of A in two dimensions; of use to a fused kernel.
        group_name: `unique_name` of the group, or torch's name for its `device_group`.
        output_shape: of the product; its last entry is not looked at.
        bias: [N], added on every rank before the sum.
        result_scale: fp32, one element; the product is multiplied with it where it becomes fp8.
        out_dtype: of the result; that of A where None.
        use_fast_accum: lets the GPU accumulate with fewer bits.

    Returns:
        `output_shape` with N last and the scattered dimension divided by W.

    Raises:
        UsageError, ConfigError: when there is no such group, or not any more.
        ConfigError: when shapes do not fit, or a gradient would be lost; nothing was sent.
        CapabilityError, CommError: as `Communicator.reduce_scatter_single` does.
    """
    communicator, algorithm = _find_engine(group_name)
    shape = _product_shape(A, B, A_scale, B_scale, output_shape)
    _scattered_shape(shape, orig_scatter_dim, communicator.world_size)
    refuse_gradient("patched_fused_scaled_matmul_reduce_scatter", A, B, A_scale, B_scale, bias)
    a, a_scale = A.flatten(0, -2).contiguous(), A_scale
    if A_scale.numel() > 1:
        a_scale = A_scale.flatten(0, -2).contiguous()
    if A.is_cuda:
        product = torch._scaled_mm(a, B, a_scale, B_scale, bias, result_scale, out_dtype, use_fast_accum)
    else:
        product = _multiply(a, B, a_scale, B_scale, bias, result_scale, out_dtype or A.dtype)
    return communicator.reduce_scatter_single(
        product.view(shape), reduce_op, dim=orig_scatter_dim, algorithm=algorithm
    )


def patched_fused_scaled_matmul_reduce_scatter_fake(  # noqa: PLR0913
    A: torch.Tensor,  # noqa: N803
    B: torch.Tensor,  # noqa: N803
    A_scale: torch.Tensor,  # noqa: N803
    B_scale: torch.Tensor,  # noqa: N803
    reduce_op: str,  # noqa: ARG001
    orig_scatter_dim: int,
    scatter_dim_after_maybe_reshape: int,  # noqa: ARG001
    group_name: str,
    output_shape: list[int],
    bias: torch.Tensor | None = None,
    result_scale: torch.Tensor | None = None,  # noqa: ARG001
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,  # noqa: ARG001
) -> torch.Tensor:
    """An empty tensor like the result of `patched_fused_scaled_matmul_reduce_scatter`, after its checks.

    Raises:
        UsageError, ConfigError: as that does. Nothing is sent.
    """
    refuse_gradient("patched_fused_scaled_matmul_reduce_scatter", A, B, A_scale, B_scale, bias)
    shape = _product_shape(A, B, A_scale, B_scale, output_shape)
    world_size = _find_engine(group_name).communicator.world_size
    scattered = _scattered_shape(shape, orig_scatter_dim, world_size)
    return A.new_empty(scattered, dtype=out_dtype or A.dtype)


def _find_engine(name: str) -> Engine:
    """By the group's own name, or by torch's: compilers that know torch's groups give that."""
    try:
        return find_engine(name)
    except UsageError:
        engine = find_torch_engine(name)
        if engine is None:
            raise
        return engine


def _product_shape(
    a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, output_shape: list[int]
) -> list[int]:
    """Of the product as the caller sees it, once the arguments have been checked."""
    if a_scale.numel() > 1 and a_scale.shape[:-1] != a.shape[:-1]:
        raise ConfigError(
            "For row-wise scaling, the leading dims of A_scale must match the leading dims of A "
            f"(A shape: {a.shape}, A_scale shape: {a_scale.shape})"
        )
    if a_scale.numel() == 0 or (a_scale.numel() > 1 and a_scale.shape[-1] != 1):
        raise ConfigError(f"Invalid A_scale shape (A shape: {a.shape}, A_scale shape: {a_scale.shape})")
    if a.dim() < 2 or b.dim() != 2 or a.shape[-1] != b.shape[0]:
        raise ConfigError(f"A {list(a.shape)} times B {list(b.shape)}: needed [..., K] and [K, N]")
    if b_scale.numel() != 1 and b_scale.shape != (1, b.shape[1]):
        raise ConfigError(f"B_scale {list(b_scale.shape)}: needed one element or [1, {b.shape[1]}]")
    shape = [*output_shape[:-1], b.shape[1]]
    if torch.Size(shape).numel() * a.shape[-1] != a.numel() * b.shape[1]:
        raise ConfigError(f"output_shape={list(output_shape)} does not hold the rows of A {list(a.shape)}")
    return shape


def _scattered_shape(shape: list[int], dim: int, world_size: int) -> list[int]:
    at = check_dim("patched_fused_scaled_matmul_reduce_scatter", shape, dim)
    if shape[at] % world_size:
        raise ConfigError(f"{shape[at]} rows along dim {dim} do not divide among {world_size} ranks")
    return [*shape[:at], shape[at] // world_size, *shape[at + 1 :]]


def _multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    result_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    product = (a.float() @ b.float()) * a_scale.float() * b_scale.float()
    if bias is not None:
        product += bias.float()
    if "float8" not in dtype_name(dtype):
        return product.to(dtype)
    if result_scale is not None:
        product *= result_scale
    limit = torch.finfo(dtype).max
    return product.clamp(-limit, limit).to(dtype)


direct_register_custom_op(
    "patched_fused_scaled_matmul_reduce_scatter",
    patched_fused_scaled_matmul_reduce_scatter,
    fake_impl=patched_fused_scaled_matmul_reduce_scatter_fake,
)
check_before_autograd("patched_fused_scaled_matmul_reduce_scatter", refuse_gradient)

"""What only a CUDA device has, as inline PTX. The interpreter and HIP never come here.

Assembly is opaque to the compiler: it neither knows what is read or written nor puts CTA barriers around it.
Every statement here has side effects and says `~{memory}`, so that it stays where it is written among the
loads, stores and barriers of its thread. Ordering between threads and GPUs comes from `publish` and
`await_peers`, whose CTA barriers are written out; see section 12 of `docs/memory-model.md`.

A multimem address reaches the same offset of all GPUs of a group: a store arrives at each, a load brings the
sum of all, which the switch takes. Ordinary loads and stores must not be given one. It is a plain 64-bit
number here, so that nothing else can be done with it by mistake.
"""

import triton
import triton.language as tl

__all__ = ["alias_fence", "multimem_load_sum", "multimem_store", "nanoseconds"]

_SUM = "multimem.ld_reduce.relaxed.sys.global.add{}{{$0, $1, $2, $3}}, [$4];"
_ZEROS = "mov.b32 $0, 0;\nmov.b32 $1, 0;\nmov.b32 $2, 0;\nmov.b32 $3, 0;\n"
_SUM_F32 = tl.constexpr(_SUM.format(".v4.f32 "))
_SUM_F16 = tl.constexpr(_SUM.format(".acc::f32.v4.f16x2 "))
_SUM_BF16 = tl.constexpr(_SUM.format(".acc::f32.v4.bf16x2 "))
_SUM_WHERE_F32 = tl.constexpr(_ZEROS + "@$5 " + _SUM.format(".v4.f32 "))
_SUM_WHERE_F16 = tl.constexpr(_ZEROS + "@$5 " + _SUM.format(".acc::f32.v4.f16x2 "))
_SUM_WHERE_BF16 = tl.constexpr(_ZEROS + "@$5 " + _SUM.format(".acc::f32.v4.bf16x2 "))
# A statement has to have a result: $0 is one that nobody reads. A store moves bits, whatever its type says.
_STORE = tl.constexpr("multimem.st.relaxed.sys.global.v4.f32 [$1], {$2, $3, $4, $5};\nmov.b32 $0, 0;")
_STORE_WHERE = tl.constexpr(
    "@$6 multimem.st.relaxed.sys.global.v4.f32 [$1], {$2, $3, $4, $5};\nmov.b32 $0, 0;"
)
_FOUR_WORDS = tl.constexpr((tl.int32, tl.int32, tl.int32, tl.int32))


@triton.jit
def nanoseconds():
    """The clock that all SMs of a GPU share, in nanoseconds. It moves in steps of up to a microsecond."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], tl.int64, is_pure=False, pack=1)


@triton.jit
def alias_fence():
    """Order this thread's accesses through one address of some memory before those through another.

    Needed after an acquire, between what was written by ordinary stores and multimem loads of it, and the
    other way round. It publishes nothing.
    """
    tl.inline_asm_elementwise(
        "fence.proxy.alias;\nmov.b32 $0, 0;", "=r,~{memory}", [], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def multimem_load_sum(address, mask, dtype: tl.constexpr, FULL: tl.constexpr):
    """Sums over all GPUs of 16 bytes at each multimem address, as four 32-bit words; zeros where masked.

    fp32 is added in fp32. fp16 and bf16 are added in fp32 and come rounded. The order is the switch's.

    Args:
        address: [N] int64, multiples of 16.
        mask: [N], where to load; nothing else is touched.
        dtype: of the elements: float32, float16 or bfloat16.
        FULL: the mask is true everywhere.
    """
    if dtype == tl.float32:
        return _load_sum(address, mask, _SUM_F32, _SUM_WHERE_F32, FULL)
    elif dtype == tl.float16:
        return _load_sum(address, mask, _SUM_F16, _SUM_WHERE_F16, FULL)
    else:
        tl.static_assert(dtype == tl.bfloat16)
        return _load_sum(address, mask, _SUM_BF16, _SUM_WHERE_BF16, FULL)


@triton.jit
def _load_sum(address, mask, ASM: tl.constexpr, ASM_WHERE: tl.constexpr, FULL: tl.constexpr):
    # The zeros are written before the address is read: hence outputs of their own (`&`).
    if FULL:
        return tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,l,~{memory}", [address], _FOUR_WORDS, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            ASM_WHERE, "=&r,=&r,=&r,=&r,l,b,~{memory}", [address, mask], _FOUR_WORDS, is_pure=False, pack=1
        )


@triton.jit
def multimem_store(address, mask, a, b, c, d, FULL: tl.constexpr):
    """Store four words, 16 bytes, at each multimem address of all GPUs, this one included.

    Args:
        address: [N] int64, multiples of 16.
        mask: [N], where to store; nothing else is touched.
        a: [N], 32 bits wide; bytes 0 to 3.
        b: bytes 4 to 7.
        c: bytes 8 to 11.
        d: bytes 12 to 15.
        FULL: the mask is true everywhere.
    """
    if FULL:
        tl.inline_asm_elementwise(
            _STORE, "=r,l,r,r,r,r,~{memory}", [address, a, b, c, d], tl.int32, is_pure=False, pack=1
        )
    else:
        tl.inline_asm_elementwise(
            _STORE_WHERE, "=r,l,r,r,r,r,b,~{memory}", [address, a, b, c, d, mask], tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip

"""Multimem kernels: forms, widths, addresses and fences, beyond what `test_ptx.py` says of every kernel."""

import functools
import re

import pytest
import torch

from tests.compile import broken, inspect_asm
from tests.compile.cases import (
    DTYPES,
    MAX_REGISTERS,
    MULTIMEM_PARAMETERS,
    PROTOCOLS,
    TARGETS,
    cases_of,
    compile_kernel,
    compiled,
    compiled_mailbox,
    mailbox_cases_of,
    parameters_of,
)

FORMS = {torch.float32: ".v4.f32", torch.float16: ".acc::f32.v4.f16x2", torch.bfloat16: ".acc::f32.v4.bf16x2"}


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


multimem_case = each(cases_of("cuda", multimem=True))
other_case = each(cases_of("cuda", multimem=False))
mailbox_case = each(mailbox_cases_of("cuda"))
collective_case = each(cases_of("cuda"))
restaging_case = each([c for c in cases_of("cuda") if c.protocol.sums and c.protocol.multicasts])


@functools.cache
def ptx_of(case):
    return inspect_asm.Ptx(compiled(case).asm["ptx"], parameters_of(case))


@functools.cache
def mailbox_ptx_of(case):
    return inspect_asm.Ptx(compiled_mailbox(case).asm["ptx"])


def check_forms(ptx, case):
    sums, multicasts = case.protocol.sums, case.protocol.multicasts
    inspect_asm.check_multimem_forms(ptx, FORMS.get(DTYPES[case.dtype]), sums, multicasts)


def test_no_multimem_kernel_is_made_for_gpus_without_the_instructions():
    targets = {case.target for case in cases_of("cuda", multimem=True)}
    assert targets == {"sm_90", "sm_100"}
    assert cases_of("hip", multimem=True) == []


def test_every_multimem_kernel_is_compiled():
    assert {c.kernel for c in cases_of("cuda", multimem=True)} == {n for n in PROTOCOLS if "multimem" in n}


@multimem_case
def test_accesses_are_16_bytes_wide_at_system_scope(case):
    check_forms(ptx_of(case), case)


@multimem_case
def test_the_multicast_address_is_for_multimem_alone(case):
    inspect_asm.check_multimem_addresses(ptx_of(case))


@multimem_case
def test_memory_changes_its_address_only_behind_a_barrier_and_a_fence(case):
    inspect_asm.check_alias_fences(ptx_of(case), case.protocol.phases)


@restaging_case
def test_sums_replace_what_they_are_the_sums_of(case):
    inspect_asm.check_sums_are_restaged_in_place(ptx_of(case))


@other_case
def test_other_kernels_run_without_multicast(case):
    inspect_asm.check_no_multimem(ptx_of(case))


@mailbox_case
def test_send_and_recv_run_without_multicast(case):
    inspect_asm.check_no_multimem(mailbox_ptx_of(case))
    inspect_asm.check_no_dependent_launch(mailbox_ptx_of(case))


@collective_case
def test_no_flag_has_the_scope_of_one_gpu(case):
    inspect_asm.check_no_gpu_scope(ptx_of(case))


@collective_case
def test_no_kernel_is_launched_as_a_dependent(case):
    inspect_asm.check_no_dependent_launch(ptx_of(case))


def the_case(name):
    (case,) = [c for c in cases_of("cuda", multimem=True) if str(c) == f"sm_90-multimem_{name}"]
    return case


ONE_SHOT, TWO_SHOT = "one_shot-bf16-8-sum", "two_shot-fp32-3-avg"
ALL_GATHER, REDUCE_SCATTER = "all_gather-i32-8-shared", "reduce_scatter-fp16-6-sum"
FENCE, BARRIER = r"fence\.proxy\.alias;", r"bar\.sync.*"


def fences(ptx, case):
    inspect_asm.check_alias_fences(ptx, case.protocol.phases)


CUTS = (
    (ONE_SHOT, r"\.acc::f32", "", check_forms, "multimem accesses are"),
    (ONE_SHOT, r"\.sys\.global\.add", ".gpu.global.add", check_forms, "multimem accesses are"),
    (TWO_SHOT, r"st\.relaxed\.sys\.global\.v4", "st.relaxed.sys.global.v2", check_forms, "multimem accesses"),
    (TWO_SHOT, r"st\.relaxed\.sys\.global", "st.relaxed.gpu.global", check_forms, "multimem accesses are"),
    (REDUCE_SCATTER, r"@%p\d+ multimem", "multimem", check_forms, "multimem accesses are"),
    (ALL_GATHER, r"(\tmultimem\.st)", r"@%p1 \1", check_forms, "multimem accesses are"),
    (ALL_GATHER, FENCE, "", fences, "0 alias fences, not 1"),
    (TWO_SHOT, FENCE, "", fences, "0 alias fences, not 2"),
    (ONE_SHOT, BARRIER, "", fences, "no barrier between"),
    (ALL_GATHER, BARRIER, "", lambda ptx, _: inspect_asm.check_publish_barriers(ptx), "no barrier between"),
    (ONE_SHOT, BARRIER, "", lambda ptx, _: inspect_asm.check_acquire_barriers(ptx), "no barrier between"),
    (
        ONE_SHOT,
        r"\.acquire",
        "",
        lambda ptx, _: inspect_asm.check_acquire_semantics(ptx, 1),
        "not an acquire at system scope",
    ),
    (
        TWO_SHOT,
        r"(multimem\.st\S+ )\[%rd\d+\]",
        r"\1[%rd1]",
        lambda ptx, _: inspect_asm.check_sums_are_restaged_in_place(ptx),
        r"stored at \['%rd1'",
    ),
    (
        ONE_SHOT,
        r"exch\.b64",
        "exch.b64.gpu",
        lambda ptx, _: inspect_asm.check_no_gpu_scope(ptx),
        "at gpu scope",
    ),
    (
        ONE_SHOT,
        r"\tret;",
        "\tgriddepcontrol.wait;\n\tret;",
        lambda ptx, _: inspect_asm.check_no_dependent_launch(ptx),
        "launched as a dependent",
    ),
    (ONE_SHOT, r"(?!)", "", lambda ptx, _: inspect_asm.check_no_multimem(ptx), "multimem accesses"),
)
"""A sound kernel, what in its assembly becomes what, a check, and what it then says."""


@pytest.mark.parametrize(("name", "pattern", "instead", "check", "message"), CUTS)
def test_broken_ptx_fails(name, pattern, instead, check, message):
    case = the_case(name)
    asm = re.sub(pattern, instead, compiled(case).asm["ptx"])
    with pytest.raises(AssertionError, match=message):
        check(inspect_asm.Ptx(asm, parameters_of(case)), case)


MODEL_CHECKS = {
    "forms": lambda ptx: inspect_asm.check_multimem_forms(ptx, ".v4.f32", True, False),
    "addresses": inspect_asm.check_multimem_addresses,
    "fences": lambda ptx: inspect_asm.check_alias_fences(ptx, 1),
    "loads follow acquires": inspect_asm.check_loads_follow_acquires,
}
MODEL_FLAWS = (
    ({"ADDRESS": "staging"}, "addresses", "not at the multicast address"),
    ({"ADDRESS": "plain"}, "addresses", "at the multicast address: ld"),
    ({"ADDRESS": "none"}, "addresses", "no multimem accesses"),
    ({"MASKED": False}, "forms", "multimem accesses are"),
    ({"FENCE": "early"}, "fences", "no alias fence between"),
    ({"FENCE": "late"}, "fences", "no alias fence between"),
    ({"LOAD_LATE": False}, "loads follow acquires", "has no acquire before it"),
)


@functools.cache
def model_ptx(changes):
    constants = broken.SOUND_MULTIMEM | dict(changes)
    compiled_model = compile_kernel(broken.multimem_kernel, TARGETS["sm_90"], "fp32", constants)
    inspect_asm.check_resources(compiled_model.asm["cubin"], MAX_REGISTERS)
    return inspect_asm.Ptx(compiled_model.asm["ptx"], MULTIMEM_PARAMETERS)


@pytest.mark.parametrize("check", MODEL_CHECKS)
def test_a_sound_model_passes(check):
    MODEL_CHECKS[check](model_ptx(()))


@pytest.mark.parametrize(("changes", "check", "message"), MODEL_FLAWS, ids=str)
def test_a_broken_model_fails(changes, check, message):
    with pytest.raises(AssertionError, match=message):
        MODEL_CHECKS[check](model_ptx(tuple(changes.items())))

import importlib
import inspect

import pytest

import tcomm.vllm
from tests import mutants
from tests.vllm import names

CASES = [
    (module, name, signature)
    for module, signatures in names.SIGNATURES.items()
    for name, signature in signatures.items()
]


def _module(name):
    return importlib.import_module(f"tcomm.vllm.{name}" if name else "tcomm.vllm")


def _find(module, name):
    found = _module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
    return found.__func__ if isinstance(found, staticmethod | classmethod) else found


def _parameters(text):
    scope = {}
    exec(f"def listed{text}: ...", {"FACTORY": names.FACTORY, "OTHER": names.OTHER}, scope)
    return list(inspect.signature(scope["listed"]).parameters.values())


def _same_default(ours, theirs):
    if theirs is names.OTHER or ours is theirs:
        return True
    if theirs is names.FACTORY:
        return repr(ours) == "<factory>" or ours is None
    return type(ours) is type(theirs) and ours == theirs


def differences(signature, text, later=frozenset()):
    """What a caller who goes by `text` would meet with when he calls what has `signature`."""
    ours, theirs = list(signature.parameters.values()), _parameters(text)
    found = []
    for mine, listed in zip(ours, theirs, strict=False):
        if (mine.name, mine.kind) != (listed.name, listed.kind):
            found.append(f"{mine.name} ({mine.kind.description}) where {listed.name} is listed")
        elif not _same_default(mine.default, listed.default):
            found.append(f"{mine.name}={mine.default!r} where {listed} is listed")
    found += [f"{listed} is missing" for listed in theirs[len(ours) :]]
    for mine in ours[len(theirs) :]:
        if mine.default is mine.empty or (mine.kind is not mine.KEYWORD_ONLY and mine.name not in later):
            found.append(f"{mine} is not listed, and not keyword-only with a default")
    return found


@pytest.mark.parametrize(("module", "name", "signature"), CASES, ids=lambda part: part.partition("(")[0])
def test_a_listed_name_is_there_and_takes_what_is_listed(module, name, signature):
    found = _find(module, name)
    if signature is names.NAME:
        return
    later = names.LATER_ARGUMENTS.get(name, frozenset())
    assert not differences(inspect.signature(found), signature, later)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("ParallelConfig", names.PARALLEL_CONFIG_FIELDS), ("EPLBConfig", names.EPLB_CONFIG_FIELDS)],
)
def test_a_configuration_has_every_field_and_default(name, fields):
    parameters = inspect.signature(_find("eplb", name)).parameters
    missing = fields.keys() - parameters.keys()
    assert not missing, sorted(missing)
    ours = {field: parameters[field].default for field in fields}
    assert ours == fields


def test_the_modules_below_hold_the_same_objects_as_the_flat_one():
    flat = vars(tcomm.vllm)
    for module in ("parallel_state", "communication_op", "utils"):
        for name in _module(module).__all__:
            if (module, name) not in {("parallel_state", "logger"), ("utils", "logger")}:
                assert flat[name] is getattr(_module(module), name), (module, name)


@pytest.mark.parametrize("module", names.SIGNATURES)
def test_a_star_import_brings_every_listed_name_and_nothing_that_is_not_there(module):
    listed = {name for name in names.SIGNATURES[module] if "." not in name}
    public = _module(module).__all__
    assert len(public) == len(set(public))
    assert {name for name in listed if not name.startswith("_")} <= set(public)
    assert all(hasattr(_module(module), name) for name in public)


def test_every_listed_function_is_among_those_that_mutants_empties():
    emptied = {str(target) for target in mutants.targets_in(mutants.ROOT, mutants.LAYER)}
    for module, name, _ in CASES:
        found = inspect.unwrap(_find(module, name))
        if inspect.isfunction(found):
            full = f"{found.__module__}.{found.__qualname__}"
            assert full in emptied or _does_nothing(found), full


def _does_nothing(function):
    """As the methods of a base class that others override."""
    return inspect.getsource(function).rstrip().endswith('"""')


def _toy(a, b=1, *, c=2):
    """For the comparison itself."""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("(a, b=1)", ""),
        ("(a, b=1, *, c=2)", ""),
        ("(x, b=1)", "a (positional or keyword) where x is listed"),
        ("(b, a=1)", "a (positional or keyword) where b is listed"),
        ("(a, b=True)", "b=1 where b=True is listed"),
        ("(a, b)", "b=1 where b is listed"),
        ("(a)", "b=1 is not listed"),
        ("(a, b=1, *, c=2, d=3)", "d=3 is missing"),
    ],
)
def test_the_comparison_sees_what_a_caller_would_meet_with(text, complaint):
    found = differences(inspect.signature(_toy), text)
    assert any(complaint in difference for difference in found) if complaint else not found


def test_a_later_argument_may_stand_behind_the_listed_ones():
    assert not differences(inspect.signature(_toy), "(a)", {"b"})

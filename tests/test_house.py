"""Rules of this house that no linter knows."""

import ast
import functools
import pathlib
import re
import subprocess
import sys

import pytest
from torch.utils._device import _device_constructors

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted((ROOT / "tcomm").rglob("*.py"))
KERNEL_FILES = sorted((ROOT / "tcomm" / "kernels").glob("*.py"))


@functools.cache
def _tree(path):
    return ast.parse(path.read_text())


@functools.cache
def _functions(path):
    return [node for node in ast.walk(_tree(path)) if isinstance(node, ast.FunctionDef)]


def _name(path):
    return str(path.relative_to(ROOT))


def _code_lines(function):
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno - body[0].lineno + 1) if body else 0


def _is_kernel(function):
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_a_file_has_at_most_400_lines():
    lengths = {_name(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_a_function_has_at_most_35_lines_of_code_and_a_kernel_60():
    limits = [
        (_name(path), f.name, _code_lines(f), 60 if _is_kernel(f) else 35)
        for path in MODULES
        for f in _functions(path)
    ]
    assert [found for found in limits if found[2] > found[3]] == []


def _exports(path):
    return [
        ast.literal_eval(node.value)
        for node in _tree(path).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]


def test_exports_are_explicit_and_sorted():
    # ruff's order: constants, then classes, then the rest
    lists = [(_name(path), list(names)) for path in MODULES for names in _exports(path)]
    assert [
        found
        for found in lists
        if found[1] != sorted(found[1], key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    ] == []


def test_only_config_and_interpret_read_the_environment():
    readers = {p.name for p in MODULES if "os.environ" in p.read_text()}
    assert readers <= {"config.py", "interpret.py", "app.py"}


def _makes_tensors(call):
    name = ast.unparse(call.func)
    return name.startswith("torch.") and name.removeprefix("torch.") in _FACTORIES


_FACTORIES = {factory.__name__ for factory in _device_constructors()}


def test_every_new_tensor_says_on_which_device():
    # `with torch.device("meta")` and torch.set_default_device decide where it is not said.
    silent = [
        f"{_name(path)}:{call.lineno}: {ast.unparse(call)}"
        for path in MODULES
        for call in ast.walk(_tree(path))
        if isinstance(call, ast.Call)
        and _makes_tensors(call)
        and "device" not in {k.arg for k in call.keywords}
    ]
    assert silent == []


def test_torchs_private_symmetric_memory_stays_in_one_file():
    users = {p.name for p in MODULES if re.search(r"_SymmetricMemory|\b_symmetric_memory", p.read_text())}
    assert users <= {"cuda.py"}


def test_inline_assembly_and_foreign_functions_stay_in_two_files():
    users = {
        p.name for p in MODULES if "inline_asm" in p.read_text() or "extern_elementwise" in p.read_text()
    }
    assert users <= {"device_cuda.py", "device_nvshmem.py"}


def test_only_its_transport_imports_nvshmem4py():
    users = {p.name for p in MODULES if re.search(r"[\"' ]nvshmem\.(core|bindings)[\"' ]", p.read_text())}
    assert users == {"nvshmem.py"}


def test_kernels_have_no_range_over_a_runtime_bound():
    for path in KERNEL_FILES:
        assert not re.search(r"in range\(", "\n".join(_kernel_sources(path))), path.name


def _kernel_sources(path):
    return [ast.unparse(f) for f in _functions(path) if _is_kernel(f)]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("all_reduce", 4),
        ("exchange", 2),
        ("reduce_scatter", 2),
        ("barrier", 1),
        ("multimem", 4),
        ("hierarchical", 2),
    ],
)
def test_launchers_are_typed_and_say_what_they_raise(name, count):
    tree = _tree(ROOT / f"tcomm/kernels/{name}.py")
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and not _is_kernel(n)]
    launchers = [n for n in functions if n.name.endswith(f"_{name}") or n.name.startswith(f"{name}_")]
    assert len(launchers) == count
    for launcher in launchers:
        arguments = launcher.args.args + launcher.args.kwonlyargs
        assert all(argument.annotation is not None for argument in arguments), launcher.name
        assert launcher.returns is not None
        assert "Raises:" in ast.get_docstring(launcher)


def test_every_kernel_shows_an_example():
    for path in KERNEL_FILES:
        for function in _functions(path):
            if function.name.endswith("_kernel"):
                assert "Example" in ast.get_docstring(function), function.name


def test_every_variable_is_documented():
    from tcomm.config import WITHOUT_EFFECT, Config, EngineConfig

    text = (ROOT / "docs" / "environment.md").read_text()
    assert [f for f in Config.__struct_fields__ if f"`TCOMM_{f.upper()}`" not in text] == []
    for field, (variable, *_) in EngineConfig.variables().items():
        value = getattr(EngineConfig(), field)
        default = {None: "unset", "": "empty"}.get(value, str(int(value) if value in {0, 1} else value))
        row = f"\n| `{variable}` | {default} | {WITHOUT_EFFECT.get(field, '')}"
        assert row in text, variable


def test_import_initialises_no_cuda_and_imports_no_triton():
    code = (
        "import sys, tcomm, torch; "
        "print([m for m in ('triton', 'rich', 'typer', 'matplotlib') if m in sys.modules], "
        "torch.cuda.is_initialized())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert out.stdout.split("\n")[0] == "[] False"

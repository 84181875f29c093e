"""The shape of the code: sizes, one-way imports, and what the package never does. Reads source, imports nothing."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jmlr_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    file
    for folder in ("jmlr_jax", "tests", "benchmarks", "tpu_scripts", ".ci")
    for file in (ROOT / folder).rglob("*")
    if file.suffix in (".py", ".sh") or file.parent.name == ".ci"
)
LONGEST_FILE = 400
LONGEST_STEP = 60
FORBIDDEN_IMPORTS = {"torch", "tensorflow", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


def _layers() -> dict[str, int]:
    """Row number of each file or folder in the list of docs/design.md; the name is relative to the package."""
    section = (ROOT / "docs" / "design.md").read_text().partition("\n## Layers")[2]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block, "docs/design.md: no list of layers under '## Layers'"
    rows: dict[str, int] = {}
    for number, line in enumerate(block[1].splitlines()):
        for word in re.split(r" {2,}", line)[0].split():
            rows[word.rstrip("/")] = number
    return rows


def _unit(relative: Path) -> str:
    """The name under which docs/design.md lists a module: its folder, or its own file name."""
    return relative.parts[0]


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute module) of every import, those inside functions too."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ("jmlr_jax", *file.relative_to(PACKAGE).parts[: -node.level])
                base = ".".join([*parts, *([base] if base else [])])
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def _own_modules(file: Path) -> Iterator[tuple[int, Path]]:
    """Yields (line, file relative to the package) of every import of ours."""
    for line, module in _imports(file):
        parts = module.split(".")
        if parts[0] != "jmlr_jax" or len(parts) == 1:
            continue
        inside = PACKAGE.joinpath(*parts[1:])
        for candidate in (inside.with_suffix(".py"), inside / "__init__.py"):
            if candidate.is_file() and candidate != file:
                yield line, candidate.relative_to(PACKAGE)


@pytest.mark.parametrize("file", SOURCES, ids=_name)
def test_no_long_file(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{_name(file)} has {lines} lines; split it"


def test_the_step_is_short() -> None:
    file = PACKAGE / "method" / "step.py"
    steps = [n for n in ast.walk(_tree(file)) if isinstance(n, ast.FunctionDef) and n.name in ("step", "train_step")]
    assert steps, "jmlr_jax/method/step.py: no function named step or train_step"
    for step in steps:
        lines = (step.end_lineno or 0) - step.lineno + 1
        assert lines <= LONGEST_STEP, f"jmlr_jax/method/step.py:{step.lineno}: {step.name} has {lines} lines"


@pytest.mark.parametrize("file", MODULES, ids=_name)
def test_imports_go_one_way(file: Path) -> None:
    rows = _layers()
    relative = file.relative_to(PACKAGE)
    if relative == Path("__init__.py"):
        assert list(_own_modules(file)) == [], (
            "jmlr_jax/__init__.py imports nothing of ours, so that --help stays quick"
        )
        return
    assert _unit(relative) in rows, f"{_name(file)} has no row in docs/design.md, '## Layers'"
    for line, imported in _own_modules(file):
        here, there = rows[_unit(relative)], rows.get(_unit(imported), -1)
        assert there <= here, f"{_name(file)}:{line}: imports {imported}, which docs/design.md lists below it"


def test_no_import_cycles() -> None:
    """Within a row or a folder the list gives no order; what remains is that no file reaches itself."""
    graph = {file.relative_to(PACKAGE): {target for _, target in _own_modules(file)} for file in MODULES}
    state: dict[Path, str] = {}

    def visit(node: Path, trail: tuple[Path, ...]) -> None:
        if state.get(node) == "done":
            return
        assert node not in trail, "import cycle: " + " -> ".join(map(str, (*trail[trail.index(node) :], node)))
        for target in sorted(graph[node]):
            visit(target, (*trail, node))
        state[node] = "done"

    for node in graph:
        visit(node, ())


def test_the_list_of_layers_is_current() -> None:
    for name in _layers():
        assert (PACKAGE / name).exists(), f"docs/design.md lists {name}, which does not exist"


@pytest.mark.parametrize("file", MODULES, ids=_name)
def test_nothing_forbidden(file: Path) -> None:
    for line, module in _imports(file):
        assert module.split(".")[0] not in FORBIDDEN_IMPORTS, f"{_name(file)}:{line}: imports {module}"
    for node in ast.walk(_tree(file)):
        if not isinstance(node, ast.Call):
            continue
        where = f"{_name(file)}:{node.lineno}"
        if isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "__import__"), f"{where}: calls {node.func.id}"
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            called = f"{node.func.value.id}.{node.func.attr}"
            assert called not in ("yaml.load", "yaml.unsafe_load", "jax.pmap", "os.system"), f"{where}: calls {called}"
        for keyword in node.keywords:
            allowed = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in ("allow_pickle", "trust_remote_code", "shell"):
                assert allowed, f"{where}: {keyword.arg} is not False"


@pytest.mark.parametrize("file", MODULES, ids=_name)
def test_errors_of_ours_share_their_base(file: Path) -> None:
    """An exception built on a builtin alone would reach the user as a traceback."""
    for node in ast.walk(_tree(file)):
        if not isinstance(node, ast.ClassDef) or node.name == "JmlrError" or not node.bases:
            continue
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        is_error = any(
            issubclass(getattr(builtins, b), Exception) for b in bases if isinstance(getattr(builtins, b, 0), type)
        )
        if is_error:
            where = f"{_name(file)}:{node.lineno}: {node.name}"
            assert any(not hasattr(builtins, b) for b in bases), f"{where} does not derive from JmlrError"


@pytest.mark.parametrize("file", MODULES, ids=_name)
def test_public_functions_say_what_they_do(file: Path) -> None:
    tree = _tree(file)
    assert ast.get_docstring(tree), f"{_name(file)}: no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{_name(file)}:{node.lineno}: {node.name} has no docstring"

"""The package keeps its floors and its limits: imports, lengths, caught errors, unfinished work."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "bittrue"

# Imports go to a lower number, or stay inside one package. The package's public names are above everything.
FLOORS = {
    "errors": 0,
    "config": 1,
    "obs": 1,
    "ops": 2,
    "dist": 2,
    "text": 2,
    "gates": 2,
    "model": 3,
    "kv": 3,
    "plan": 4,
    "spec": 4,
    "train": 4,
    "engine": 5,
    "server": 6,
    "rl": 6,
    "bench": 7,
    "probes": 8,
    "dashboard": 8,
    "cli": 9,
}
TOP_FLOOR = 10

TORCH_FREE = (
    "bittrue",
    "bittrue.errors",
    "bittrue.config",
    "bittrue.obs",
    "bittrue.text",
    "bittrue.gates",
    "bittrue.plan",
    "bittrue.kv.layout",
    "bittrue.kv.pages",
    "bittrue.kv.prefix",
    "bittrue.kv.manager",
    "bittrue.engine.types",
    "bittrue.engine.scheduler",
    "bittrue.rl.types",
    "bittrue.rl.advantage",
    "bittrue.rl.buffer",
)

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_POSITIONAL = 6
KERNEL_FOLDERS = ("ops/cpu/", "ops/triton/")  # launchers are exempt from length limits
# An op's signature is its contract, as wide as the contract says.
WIDE_FOLDERS = ("ops/", "train/autograd", "train/differentiable")
CATCH_ALL = (
    "cli/main.py",
    "engine/process.py",
    "rl/rollout.py",
)  # each records what it caught, none swallows
LAZY_IMPORTS = ("__init__.py", "cli/")  # so that `bittrue --help` and `import bittrue` start without torch


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule; ``file`` is relative to the package."""

    file: str
    line: int
    message: str


@dataclass(frozen=True, slots=True)
class Module:
    """One parsed source file."""

    name: str  # dotted, "bittrue" for the package's own __init__
    file: str  # relative to the package root
    text: str
    tree: ast.Module

    @property
    def floor(self) -> int | None:
        part = self.name.split(".")[1] if "." in self.name else None
        return TOP_FLOOR if part is None else FLOORS.get(part)


def modules(root: Path) -> list[Module]:
    """Every module under ``root``, the folder of the package ``bittrue``."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        parts = relative.with_suffix("").parts
        name = ".".join(("bittrue", *parts[:-1], *(() if parts[-1] == "__init__" else parts[-1:])))
        text = path.read_text(encoding="utf-8")
        found.append(Module(name, relative.as_posix(), text, ast.parse(text)))
    return found


def imports(module: Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement at any depth with the dotted name it may load; ``from a import b`` is a.b."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def floor_of(target: str) -> int | None:
    """Floor of an imported name; None when no such package is in the table."""
    parts = target.split(".")
    return FLOORS.get(parts[1]) if len(parts) > 1 else TOP_FLOOR


def upward_imports(root: Path) -> list[Violation]:
    found = []
    for module in modules(root):
        if module.floor is None:
            found.append(Violation(module.file, 1, f"{module.name} has no floor: add its package to FLOORS"))
            continue
        home = module.name.split(".")[1] if "." in module.name else ""
        for node, target in imports(module):
            if target.split(".")[0] != "bittrue" or target.split(".")[1:2] == [home]:
                continue
            floor = floor_of(target)
            if floor is None or floor >= module.floor:
                message = f"{module.name} (floor {module.floor}) imports {target} (floor {floor})"
                found.append(Violation(module.file, node.lineno, message))
    return found


def relative_imports(root: Path) -> list[Violation]:
    return [
        Violation(module.file, node.lineno, "relative import")
        for module in modules(root)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]


def lazy_imports(root: Path) -> list[Violation]:
    """Imports below the top level, and imports that only a type checker sees."""
    found = []
    for module in modules(root):
        if module.file == "__init__.py" or module.file.startswith(LAZY_IMPORTS[1:]):
            continue
        top = {id(node) for node in module.tree.body}
        found += [
            Violation(module.file, node.lineno, f"import of {target} below the top level")
            for node, target in imports(module)
            if id(node) not in top
        ]
    return found


def loads_torch(root: Path) -> list[Violation]:
    """Torch-free modules that load torch, themselves or through what they import at the top level."""
    graph = {module.name: top_level_imports(module) for module in modules(root)}
    reasons: dict[str, str | None] = {}
    found = []
    for module in modules(root):
        if any(module.name == free or is_inside(module.name, free) for free in TORCH_FREE):
            why = path_to_torch(module.name, graph, reasons)
            if why is not None:
                found.append(Violation(module.file, 1, why))
    return found


def top_level_imports(module: Module) -> list[str]:
    top = {id(node) for node in module.tree.body}
    return [target for node, target in imports(module) if id(node) in top]


def path_to_torch(target: str, graph: dict[str, list[str]], reasons: dict[str, str | None]) -> str | None:
    """How importing ``target`` loads torch, or None. Importing a.b.c runs a, a.b and a.b.c."""
    parts = target.split(".")
    if parts[0] == "torch":
        return "torch"
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if name in graph and name not in reasons:
            reasons[name] = None  # a cycle adds nothing
            paths = (path_to_torch(imported, graph, reasons) for imported in graph[name])
            reasons[name] = next((f"{name} -> {path}" for path in paths if path), None)
        if reasons.get(name):
            return reasons[name]
    return None


def is_inside(name: str, package: str) -> bool:
    return package != "bittrue" and name.startswith(f"{package}.")


def too_long(root: Path) -> list[Violation]:
    found = []
    for module in modules(root):
        if module.file.startswith(KERNEL_FOLDERS):
            continue
        lines = module.text.count("\n")
        if lines > MAX_FILE_LINES:
            found.append(Violation(module.file, 1, f"{lines} lines, at most {MAX_FILE_LINES}"))
        for function in functions(module):
            size = (function.end_lineno or function.lineno) - function.lineno + 1
            if size > MAX_FUNCTION_LINES:
                message = f"{function.name} has {size} lines, at most {MAX_FUNCTION_LINES}"
                found.append(Violation(module.file, function.lineno, message))
    return found


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def wide_signatures(root: Path) -> list[Violation]:
    found = []
    for module in modules(root):
        if module.file.startswith(WIDE_FOLDERS):
            continue
        for function in functions(module):
            names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_POSITIONAL:
                message = f"{function.name} takes {count} positional parameters, at most {MAX_POSITIONAL}"
                found.append(Violation(module.file, function.lineno, message))
    return found


def catch_alls(root: Path) -> list[Violation]:
    found = []
    for module in modules(root):
        if module.file in CATCH_ALL:
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler) and is_catch_all(node.type) and not passes_on(node):
                found.append(Violation(module.file, node.lineno, "catches every exception"))
    return found


def is_catch_all(caught: ast.expr | None) -> bool:
    if caught is None:
        return True
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(isinstance(name, ast.Name) and name.id in ("Exception", "BaseException") for name in names)


def passes_on(handler: ast.ExceptHandler) -> bool:
    """Whether the handler only cleans up: it ends by raising what it caught."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def without_docstring(root: Path) -> list[Violation]:
    """Non-empty modules whose first line is not the sentence that says what they are."""
    found = []
    for module in modules(root):
        first = module.tree.body[0] if module.tree.body else None
        if module.text.strip() and (
            ast.get_docstring(module.tree) is None or first is None or first.lineno != 1
        ):
            found.append(Violation(module.file, 1, "the first line does not say what the file is"))
    return found


def environment_reads(root: Path) -> list[Violation]:
    """Reads of the environment outside config/load.py and the command line."""
    found = []
    for module in modules(root):
        if module.file == "config/load.py" or module.file.startswith("cli/"):
            continue
        for node in ast.walk(module.tree):
            is_environ = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
            if is_environ and isinstance(node.value, ast.Name) and node.value.id == "os":
                found.append(Violation(module.file, node.lineno, f"os.{node.attr}"))
    return found


def unfinished(root: Path) -> list[Violation]:
    """Marks of work left undone."""
    marks = ("TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error")
    return [
        Violation(module.file, number, line.strip())
        for module in modules(root)
        for number, line in enumerate(module.text.splitlines(), 1)
        if any(mark in line for mark in marks)
    ]


RULES = (
    upward_imports,
    relative_imports,
    lazy_imports,
    loads_torch,
    too_long,
    wide_signatures,
    catch_alls,
    without_docstring,
    environment_reads,
    unfinished,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_breaks_no_rule(rule) -> None:  # type: ignore[no-untyped-def]
    violations = rule(ROOT)
    assert not violations, "\n".join(f"bittrue/{v.file}:{v.line}: {v.message}" for v in violations)


def test_every_folder_of_the_package_has_a_floor() -> None:
    parts = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.is_dir() or p.suffix == ".py"}
    assert parts - {"__init__", "__pycache__"} <= set(FLOORS)


def test_torch_free_modules_start_without_torch() -> None:
    names = [m.name for m in modules(ROOT) if any(m.name == f or is_inside(m.name, f) for f in TORCH_FREE)]
    assert "bittrue.engine.types" in names
    program = f"import sys, importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    program += "    assert 'torch' not in sys.modules, f'{name} loads torch'\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- planted violations ------------------------------------------------------------------------------

GOOD = '"""A module that breaks nothing."""\n'
LONG_FUNCTION = GOOD + "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
PLANTED = {
    "upward": (upward_imports, "model/net.py", GOOD + "import bittrue.engine.engine\n"),
    "upward from the package": (upward_imports, "model/net.py", GOOD + "from bittrue import engine\n"),
    "upward and lazy": (upward_imports, "ops/a.py", GOOD + "def f():\n    from bittrue.model import net\n"),
    "upward for types only": (
        upward_imports,
        "kv/pool.py",
        GOOD + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bittrue.cli import main\n",
    ),
    "model imports kv": (upward_imports, "model/net.py", GOOD + "from bittrue.kv import pages\n"),
    "kv imports model": (upward_imports, "kv/pages.py", GOOD + "from bittrue.model.net import f\n"),
    "server imports rl": (upward_imports, "server/app.py", GOOD + "from bittrue.rl import loop\n"),
    "errors import config": (upward_imports, "errors.py", GOOD + "from bittrue.config.run import x\n"),
    "import of the package itself": (upward_imports, "cli/main.py", GOOD + "from bittrue import Engine\n"),
    "a package without floor": (upward_imports, "helpers/a.py", GOOD),
    "relative": (relative_imports, "model/net.py", GOOD + "from . import build\n"),
    "inside a function": (lazy_imports, "model/net.py", GOOD + "def f():\n    import torch\n"),
    "torch": (loads_torch, "kv/layout.py", GOOD + "import torch.nn\n"),
    "torch at one remove": (loads_torch, "engine/types.py", GOOD + "from bittrue.ops.slow import f\n"),
    "torch in the package of a free module": (
        loads_torch,
        "kv/__init__.py",
        GOOD + "from torch import Tensor\n",
    ),
    "a long file": (too_long, "model/net.py", GOOD + "x = 1\n" * MAX_FILE_LINES),
    "a long function": (too_long, "model/net.py", LONG_FUNCTION),
    "a wide signature": (wide_signatures, "model/net.py", GOOD + "def f(a, b, c, d, e, g, h): ...\n"),
    "except Exception": (
        catch_alls,
        "server/app.py",
        GOOD + "try:\n    x = 1\nexcept (ValueError, Exception):\n    x = 2\n",
    ),
    "bare except": (catch_alls, "server/app.py", GOOD + "try:\n    x = 1\nexcept:\n    x = 2\n"),
    "no docstring": (without_docstring, "model/net.py", "x = 1\n"),
    "docstring on the second line": (without_docstring, "model/net.py", "\n" + GOOD),
    "environment": (environment_reads, "model/net.py", GOOD + "import os\nx = os.environ['A']\n"),
    "unfinished": (unfinished, "model/net.py", GOOD + "# TO" + "DO later\n"),
}


def plant(root: Path, file: str, text: str) -> None:
    """A small clean package with one file replaced."""
    clean = {"ops/slow.py": GOOD + "import torch\nf = torch\n", "kv/pages.py": GOOD, "engine/types.py": GOOD}
    for name, content in {**clean, "kv/layout.py": GOOD, file: text}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(name: str, tmp_path: Path) -> None:
    rule, file, text = PLANTED[name]
    plant(tmp_path, file, text)
    found = rule(tmp_path)
    assert found
    if rule is not loads_torch:
        assert {violation.file for violation in found} == {file}


def test_allowed_things_are_not_found(tmp_path: Path) -> None:
    plant(tmp_path, "kv/pool.py", GOOD + "import torch\nfrom bittrue.ops.slow import f\n")
    plant(
        tmp_path,
        "cli/main.py",
        GOOD + "def main():\n    try:\n        import torch\n    except Exception: ...\n",
    )
    plant(tmp_path, "ops/cpu/impls.py", LONG_FUNCTION)
    plant(tmp_path, "model/__init__.py", "")
    for rule in RULES:
        assert not rule(tmp_path), rule.__name__

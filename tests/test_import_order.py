"""Imports run one way, low to high; this is the order."""

import ast
from pathlib import Path

import secateur

ORDER = [
    {"errors", "files", "launcher", "recipe", "settings", "steps", "plan", "versions", "__init__"},
    {"shapes"},
    {"models"},
    {"calibration"},
    {"evaluation"},
    {"scores", "surgery"},
    {"healing"},
    {"methods", "checkpoints"},
    {"runs", "console", "result_tables", "options"},
    {"pipeline"},
    {"comparing", "reporting"},
    {"terminal"},
    {"demonstration"},
    {"listing", "measuring", "presenting", "pruning", "publishing", "studies"},
    {"cli"},
    {"__main__"},
]
PACKAGE = Path(secateur.__file__).parent


def rank(name: str) -> int:
    return next(number for number, level in enumerate(ORDER) if name in level)


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("secateur."):
            found.add(node.module.split(".")[1])
    return found


def test_imports_run_one_way():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if place == "__init__":
            continue
        wrong += [f"{file.name} imports {name}" for name in imported(file) if rank(name) > rank(place)]
    assert not wrong


def test_neighbours_do_not_import_each_other():
    for file in (PACKAGE / "methods").glob("*.py"):
        assert "checkpoints" not in imported(file)
    for file in (PACKAGE / "checkpoints").glob("*.py"):
        assert "methods" not in imported(file)
    for file in (PACKAGE / "surgery").glob("*.py"):
        assert "scores" not in imported(file)


def test_the_engine_knows_no_method_by_name():
    from secateur.methods.registry import METHODS

    for name in ("planning.py", "budget.py", "method.py"):
        code = ast.parse((PACKAGE / "methods" / name).read_text())
        strings = {node.value for node in ast.walk(code) if isinstance(node, ast.Constant)}
        assert not strings & set(METHODS), name

"""Imports run one way, low to high, without a cycle; this is the order."""

import ast
from collections.abc import Iterator
from pathlib import Path

import secateur

ORDER = [
    {"errors"},
    {"ownership", "interruption", "reading"},
    {"versions", "files", "settings", "progress", "distributed", "plugins"},
    {"claims"},
    {"run_options"},
    {"plan", "modeling"},
    {"models"},
    {"data"},
    {"calibration"},
    {"evaluation", "surgery", "scores"},
    {"training"},
    {"methods", "healing", "checkpoints"},
    {"export"},
    {"jobs"},
    {"experiments"},
    {"reporting"},
    {"cli"},
    {"__main__"},
]
"""Rooms of one level may import each other only as `SIDEWAYS` says."""
SIDEWAYS = {("scores", "surgery")}
PACKAGE = Path(secateur.__file__).parent


def rank(room: str) -> int:
    return next(number for number, level in enumerate(ORDER) if room in level)


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Name the rooms that a file imports, wherever the import stands; the package itself is `secateur`."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "relative import"
        elif isinstance(node, ast.ImportFrom):
            package = (node.module or "").split(".")
            names = [f"secateur.{one.name}" for one in node.names] if package == ["secateur"] else [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        for name in names:
            root, _, rest = name.partition(".")
            if root == "secateur":
                yield rest.split(".")[0] or "secateur"


def files() -> list[Path]:
    return [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]


def test_every_room_has_its_place():
    assert {room_of(file) for file in files()} == set().union(*ORDER)


def test_imports_run_one_way():
    wrong = []
    for file in files():
        here = room_of(file)
        for room in imported(file):
            if room == here:
                continue
            above = room not in set().union(*ORDER) or rank(room) > rank(here)
            beside = not above and rank(room) == rank(here) and (here, room) not in SIDEWAYS
            if above or beside:
                wrong.append(f"{file.relative_to(PACKAGE)} imports {room}")
    assert not wrong


def test_the_test_sees_every_kind_of_import(tmp_path):
    file = tmp_path / "one.py"
    file.write_text("import secateur\nfrom secateur import cli\ndef f():\n    import secateur.plan.plan\n")
    assert set(imported(file)) == {"secateur", "cli", "plan"}


def test_no_module_imports_itself_in_a_circle():
    """Modules, not rooms: what is imported when a module is loaded never leads back to it."""
    graph = {_module(file): set(_loaded(file)) for file in files()}
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in graph.get(module, ()):
                follow(other, (*path, module))
            done.add(module)

    for module in graph:
        follow(module, ())


def _module(file: Path) -> str:
    return ".".join(("secateur", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def _loaded(file: Path) -> Iterator[str]:
    known = {_module(one) for one in files()}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("secateur."):
            inside = [f"{node.module}.{one.name}" for one in node.names]
            yield from ([one for one in inside if one in known] or [node.module])


def test_the_engine_knows_no_method_by_name():
    from secateur.methods.method import METHODS

    for name in ("planning.py", "budget.py", "method.py"):
        code = ast.parse((PACKAGE / "methods" / name).read_text())
        strings = {node.value for node in ast.walk(code) if isinstance(node, ast.Constant)}
        assert not strings & set(METHODS), name

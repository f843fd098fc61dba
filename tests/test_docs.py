"""The documentation says what the code does: tables, settings, links, commands, error messages, the worked example."""

import ast
import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

import secateur
from secateur.cli.main import COMMANDS, load
from secateur.cli.options import read_pairs
from secateur.jobs.heal import find_healing_recipe
from secateur.methods.method import METHODS
from secateur.methods.sequence import read_sequence
from secateur.settings import read_settings
from toy_packages import installed

ROOT = Path(__file__).parents[1]
BESIDE = [ROOT / "benchmarks" / "README.md", ROOT / "recipes" / "README.md"]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *BESIDE])
NAMED = {str(page.relative_to(ROOT)): page for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    specification = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    sys.path.remove(str(ROOT / "benchmarks"))
    return module


@pytest.mark.parametrize("name", NAMED)
def test_tables_are_those_of_the_results_and_the_code(name, tables):
    text = NAMED[name].read_text()
    assert tables.filled(text) == text, "run: python benchmarks/tables.py"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_with_its_settings(name, tables):
    lines = (ROOT / "docs" / "methods" / f"{name}.md").read_text().splitlines()
    assert f"`{name}`" in lines[0]
    for key, field in METHODS[name].settings.model_fields.items():
        default = "not set" if field.default is None else tables.word(field.default)
        assert any(line.startswith(f"| `{key}` |") and default in line for line in lines), f"{key}: {default}"


def test_the_last_measurement_counts_and_healing_is_shown(tables, tmp_path, monkeypatch):
    def line(blocks, perplexity, **more):
        setting = {"method": "sleb", "blocks": blocks, "windows": 32}
        found = {"removed": 0.07 * blocks, "gone": [4] * blocks, "perplexity": perplexity, "dense": 16.9}
        if more:
            setting["healing"] = {"by": "full", "tokens": 50000}
        return json.dumps({"setting": setting, "found": found | more}) + "\n"

    (tmp_path / "methods_table.jsonl").write_text(line(1, 18.0) + line(2, 20.0) + line(2, 19.5, healed=18.25))
    monkeypatch.setattr(sys.modules["table_parts"], "RESULTS", tmp_path)
    table = tables.measured("sleb")
    assert "| as it is | 18.00 (4) | 19.50 (4, 4) |" in table
    assert "| … healed | – | 18.25 |" in table
    assert table.endswith("Healed: 50,000 tokens by `full`.")
    assert "19.50 → 18.25 (14.0 %) | – | – |" in tables.comparison()


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMED)
def test_links_lead_somewhere(name):
    page = NAMED[name]
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(text):
    """Return the words of every secateur command in a page, and whether it is a whole one (in a block of its own)."""
    for language, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            said = re.sub(r"\s+#.*$", "", line).strip()
            if language == "" and (found := re.search(r"(?:^|-m )secateur (.*)$", said)):
                yield shlex.split(found[1]), "…" not in said
    for said in re.findall(r"`secateur ([^`]+)`", FENCE.sub("", text)):
        yield shlex.split(said), False


@pytest.mark.parametrize("name", NAMED)
def test_commands_are_those_of_the_command_line(name):
    for words, whole in commands(NAMED[name].read_text()):
        if words[0].startswith("-"):
            continue
        assert words[0] in COMMANDS, words
        command = load(words[0])
        if not whole:
            options = {one for parameter in command.params for one in (*parameter.opts, *parameter.secondary_opts)}
            assert {word for word in words if word.startswith("-")} <= options | {"-h", "--help"}, words
            continue
        given = command.make_context(words[0], words[1:]).params
        if given.get("method"):
            read_sequence(given["method"], read_pairs(given["set_"]))
        elif given.get("with_"):
            read_settings(given["with_"], find_healing_recipe(given["with_"]).settings, read_pairs(given["set_"]))


def literals():
    """Return every text in the package, `…` in the place of what is filled in."""
    for file in Path(secateur.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_error_messages_in_the_documentation_are_real_ones():
    messages = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "failures.md").read_text(), re.MULTILINE)
    assert len(messages) > 40
    ours = "\n".join(literals())
    for message in messages:
        pattern = re.escape(message).replace("…", "[^\n]*")
        assert re.search(pattern, ours), message


def blocks(name):
    return [code for language, code in FENCE.findall((ROOT / "docs" / name).read_text()) if language == "python"]


@pytest.mark.parametrize("name", NAMED)
def test_python_in_the_documentation_is_python(name):
    for language, code in FENCE.findall(NAMED[name].read_text()):
        if language == "python":
            ast.parse(code)


def test_the_worked_example_of_a_method_works(bundled, tmp_path, warm_python):
    """Installed as the page says, in a fresh process: the plan is what the score says, and the method is listed."""
    written, used, _, _ = blocks("add-a-method.md")
    (entry,) = re.findall(r'^\[project\.entry-points\."(.+)"\]\nsmall_steps = "small_steps"$', PAGE, re.MULTILINE)
    site = installed(tmp_path / "site", written, "small_steps", entry)
    shown = "print(json.dumps([plan.steps[0].blocks, pruned.block_count, list(METHODS), nothing.removed_fraction]))"
    script = f"""import json
{used}
from secateur.methods.method import METHODS
nothing = secateur.make_plan(model, method="small-steps", blocks=0)
{shown}"""
    places = os.pathsep.join([str(site), str(Path(secateur.__file__).parents[1])])
    done = warm_python.run("-c", script, environment=os.environ | {"PYTHONPATH": places})
    assert done.returncode == 0, done.stderr
    removed, count, names, nothing = json.loads(done.stdout)
    found = secateur.score(bundled, windows=2, kinds=("magnitude",)).relative_magnitude
    assert removed == sorted(sorted(range(bundled.block_count - 1), key=lambda block: found[block])[:2])
    assert count == bundled.block_count - 2
    assert "small-steps" in names
    assert nothing == 0


PAGE = (ROOT / "docs" / "add-a-method.md").read_text()


def test_the_step_and_the_metric_of_the_page_are_those_that_are_tested():
    """The step is the toy's, shortened; the metric runs."""
    _, _, step, bits = blocks("add-a-method.md")
    toy = (ROOT / "tests" / "methods" / "toy_package" / "toy_scale.py").read_text()
    plain = re.sub(r'\n? *"""[^"]*"""\n', "\n", step).replace("\n\n", "\n")
    code = [line for line in plain.splitlines() if line.strip() and "import" not in line and not line.endswith("...")]
    assert [line for line in code if line not in toy] == []
    names: dict = {}
    exec(bits.replace('@metric("bits-per-token")\n', ""), names)
    assert callable(names["bits_per_token"])

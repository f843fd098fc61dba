"""Public means `__all__`; modules never hide a public function, and the bundled model is what its notes say."""

import inspect
from pathlib import Path

import secateur


def test_every_public_name_exists_and_is_documented():
    assert sorted(secateur.__all__) == secateur.__all__
    for name in secateur.__all__:
        thing = getattr(secateur, name)
        assert not inspect.ismodule(thing), f"a module hides the public name {name}"
        assert inspect.getdoc(thing), name


def test_every_command_is_a_public_function():
    measuring = ("score", "evaluate", "bench", "inspect", "compare", "report")
    for command in (*measuring, "prune", "heal", "demo", "push", "convert", "run"):
        assert callable(getattr(secateur, command))
    assert callable(secateur.make_plan)


def test_a_model_in_memory_is_cut_without_a_folder(bundled, tmp_path):
    model = secateur.open_model(bundled.module, tokenizer=bundled.tokenizer)
    pruned = secateur.prune(model, secateur.make_plan(model, method="last-n", blocks=2))
    secateur.save(pruned, tmp_path / "cut", check=False)
    assert secateur.open_model(tmp_path / "cut").block_count == 10
    assert (tmp_path / "cut" / "tokenizer.json").is_file()


def test_no_machine_paths_and_no_leftovers_in_the_package():
    for file in Path(secateur.__file__).parent.rglob("*.py"):
        text = file.read_text()
        assert "/work/" not in text
        assert "TO" + "DO" not in text, file


def test_there_are_about_ten_functions_and_their_values():
    functions = [name for name in secateur.__all__ if name[0].islower()]
    assert len(functions) <= 16
    assert len(secateur.__all__) - len(functions) <= 12

"""The recipes of the three papers: their settings are the publications', and they run end to end on another model."""

import json
from pathlib import Path

import pytest

import secateur
from secateur.experiments.recipe import Recipe, Study, read_recipe

FOLDER = Path(__file__).parents[2] / "recipes"

LORA = {"epochs": 2, "learning_rate": 1e-4, "batch_size": 64, "rank": 8, "alpha": 16}
MERGING = {
    "texts": "bookcorpus",
    "windows": 10,
    "seq_len": 128,
    "compare.remove": (0.2, 0.35),
    "compare.heal.1.texts": "alpaca-cleaned",
    "compare.heal.1.instructions": True,
    "compare.heal.1.seq_len": 256,
    "compare.heal.1.settings": LORA,
    "eval.texts": "wikitext2,ptb",
    "eval.seq_len": 128,
}
CALIBRATION = {"texts": "slimpajama", "windows": 500, "seq_len": 2048}
PUBLISHED = {
    # Chen et al. 2024, section 4.1; 30,000 samples by its authors in issue 11 of the released code
    "llm-streamline": CALIBRATION
    | {
        "prune.remove": 0.25,
        "prune.settings.network": "block",
        "prune.settings.loss": "mse",
        "prune.settings.train_tokens": 30_000 * 2048,
        "prune.settings.learning_rate": 2e-4,
        "prune.settings.final_learning_rate": 5e-5,
        "prune.settings.weight_decay": 1e-3,
        "prune.settings.clip": 5,
        "prune.settings.batch_size": 8 * 16,
        "prune.settings.epochs": 1,
    },
    # its released code's README
    "llm-streamline-lm-llama-2-7b": CALIBRATION
    | {
        "prune.target_params": 4.7e9,
        "prune.settings.network_blocks": 1,
        "prune.settings.loss": "lm",
        "prune.settings.train_tokens": "60M",
        "eval.tasks": "streamline",
    },
    "llm-streamline-lm-llama-3.1-8b": CALIBRATION
    | {
        "prune.target_params": 5.4e9,
        "prune.settings.network_blocks": 2,
        "prune.settings.loss": "lm",
        "prune.settings.train_tokens": "1.3B",
        "eval.tasks": "streamline",
    },
    # Ding et al. 2025, section 4.1, and the released code's arguments
    "sliding-window-merging": MERGING | {"model": "lmsys/vicuna-7b-v1.3"},
    "sliding-window-merging-llama": MERGING | {"model": "meta-llama/Llama-2-7b-hf"},
    "merging-and-width": MERGING,
    # Dumitru et al. 2024, section 3, and the released code's sweep
    "dynamic-slicing": {
        "texts": "wikitext2",
        "windows": 128,
        "seq_len": 2048,
        "prune.slicing": 0.30,
        "prune.settings.slice_base": "sweep",
        "prune.settings.score_texts": "pg19-validation",
        "prune.settings.score_seq_len": 1024,
        "eval.tasks": "commonsense,mmlu",
    },
}


def at(recipe, path):
    found = recipe
    for part in path.split("."):
        if isinstance(found, dict):
            found = found[part]
        elif part.isdigit():
            found = found[int(part)]
        else:
            found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_those_of_the_publication(name):
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    for path, value in PUBLISHED[name].items():
        assert at(recipe, path) == value, path


@pytest.fixture
def instructions(tmp_path):
    file = tmp_path / "instructions.jsonl"
    rows = [{"instruction": f"Say {n}.", "input": "", "output": str(n) * 4} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("name", PUBLISHED)
def test_with_another_model_and_texts_it_runs(name, tiny_with_tokenizer, instructions, tmp_path, monkeypatch):
    """With the model, the texts and the amount of text exchanged; of a study its last cell."""
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    source = tmp_path / "text.txt"
    source.write_text(" ".join(map(str, range(3000))))
    plain = {
        "model": tiny_with_tokenizer,
        "texts": str(source),
        "windows": 8,
        "seq_len": 32,
        "check": False,
        "eval": {"texts": str(source), "windows": 2, "seq_len": 32},
    }
    if isinstance(recipe, Study):
        method, heal = recipe.compare.methods[0], recipe.compare.heal[-1]
        cut = {
            "method": method.method,
            "remove": recipe.compare.remove[-1],
            "settings": method.settings,
        }
        if "llm-pruner" in method.method:  # it protects six blocks, which is all that is left of eight
            cut["settings"] = cut["settings"] | {"llm-pruner.protect_first": 1}
        plain["heal"] = heal.model_dump(by_alias=True, exclude_none=True)
        plain["heal"] |= {"texts": instructions, "tokens": 2000, "seq_len": 64}
        plain["heal"]["settings"] |= {"batch_size": 8}
    else:
        cut = recipe.prune.model_dump(by_alias=True, exclude_none=True)
        streamline = {"train_tokens": 512, "train_texts": str(source), "batch_size": 4}
        cut["settings"] |= {"score_texts": str(source), "score_seq_len": 16} if "score_texts" in cut["settings"] else {}
        cut["settings"] |= streamline if cut["method"] == "streamline" else {}
        if "target_params" in cut:
            cut["target_params"] = 0.7 * secateur.open_model(tiny_with_tokenizer).parameter_count
    (outcome,) = secateur.run(Recipe.model_validate(plain | {"prune": cut}), tmp_path / "run")
    assert outcome.perplexity > 1
    assert outcome.removed > 0 or name == "dynamic-slicing"  # its shortcuts outweigh what goes, in so small a model

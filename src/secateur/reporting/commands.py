"""The commands that reproduce a cell, reconstructed from its files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from secateur.healing.recipes import HEALING_RECIPES
from secateur.methods.method import METHODS
from secateur.plan.plan import Plan, Search
from secateur.reporting.cells import Cell, Contents

_OPTIONS = {
    "remove": "--remove",
    "blocks": "--blocks",
    "slice": "--slice",
    "target_params": "--target-params",
    "target_memory": "--target-memory",
    "target_speedup": "--target-speedup",
    "context": "--context",
}


def commands_of(contents: Contents, cell: Cell) -> list[str]:
    """Return the command lines for one cell: the whole recipe if there is one, and each stage separately."""
    lines = []
    if cell.recipe is not None:
        recipe = Path(contents.folder.resolve().name, cell.recipe.relative_to(contents.folder))
        lines.append(_words("secateur", "run", recipe, "-o", f"again/{cell.name}"))
    last = contents.model
    for number, plan in enumerate(cell.plans):
        file, cut = (f"plan{number or ''}.json", f"cut{number or ''}/")
        lines += [_plan_line(plan, last, file), _words("secateur", "prune", last, "--plan", file, "-o", cut)]
        last = cut
    for facts in cell.healed:
        lines.append(_heal_line(facts, last))
        last = "healed/"
    return lines + _measuring_lines(contents, cell, last)


def _plan_line(plan: Plan, model: str, file: str) -> str:
    named, chosen = _by_steps(plan) if plan.search is None else _by_search(plan.search)
    asked = {name: value for name, value in plan.requested.items() if name in _OPTIONS and value is not None}
    words: list[object] = ["secateur", "plan", model, "--method", named]
    words += [word for name, value in asked.items() for word in (_OPTIONS[name], value)]
    words += chosen + (_texts(plan.texts) if plan.texts else [])
    return _words(*words, "--seed", plan.seed, "-o", file)


def _by_steps(plan: Plan) -> tuple[str, list[object]]:
    """Return the methods of a plan as arguments, with the settings that were chosen for them."""
    firsts = {step.method: step for step in reversed(plan.steps)}
    methods = list(reversed(firsts))
    words: list[object] = []
    for method in (one for one in methods if one in METHODS):
        owner = f"{method}." if len(methods) > 1 else ""
        words += _chosen(METHODS[method].settings, firsts[method].settings, owner)
    return str(plan.requested.get("methods") or ",".join(methods)), words


def _by_search(search: Search) -> tuple[str, list[object]]:
    """Return the search as arguments, with the settings chosen for it and for its methods."""
    known = METHODS["auto"].settings
    settings = known.model_validate(search.settings).model_dump()
    of = settings.pop("of") or {}
    own = [(f"{method}.{name}", value) for method, given in of.items() for name, value in given.items()]
    return "auto", _chosen(known, settings) + [word for name, value in own for word in ("--set", f"{name}={value}")]


def _heal_line(facts: dict[str, Any], model: str) -> str:
    texts = facts.get("texts") or {}
    recipe = str(facts.get("with", "lora"))
    words: list[object] = ["secateur", "heal", model, "--with", recipe]
    words += ["--texts", texts["source"]] if "source" in texts else []
    words += ["--instructions"] if texts.get("instructions") else []
    tokens = texts.get("windows", 0) * texts.get("seq_len", 0)
    words += ["--tokens", tokens, "--seq-len", texts["seq_len"]] if tokens else []
    words += ["--teacher", facts["teacher"]["source"]] if "teacher" in facts else []
    words += _chosen(HEALING_RECIPES[recipe].settings, facts.get("settings") or {}) if recipe in HEALING_RECIPES else []
    return _words(*words, "--seed", facts.get("seed", 0), "-o", "healed/")


def _chosen(settings: type[BaseModel], values: dict[str, Any], owner: str = "") -> list[object]:
    """Return the settings that differ from their defaults.

    Values that a search determined are recorded with the losses it compared (`loss_by_…`) and omitted here.
    """
    fields = settings.model_fields
    unusual = [name for name in fields if values.get(name) not in (None, fields[name].default)]
    chosen = [name for name in unusual if f"loss_by_{name}" not in values]
    return [word for name in chosen for word in ("--set", f"{owner}{name}={values[name]}")]


def _measuring_lines(contents: Contents, cell: Cell, model: str) -> list[str]:
    lines = []
    against = ["--against", contents.model] if model != contents.model else []
    read, tasks = cell.measured.perplexities(), cell.measured.tasks()
    if read or tasks:
        asked = []
        if tasks:
            one = next(one for one in cell.measured.results if one.task == tasks[0])
            limit = one.settings.get("limit")
            shots = one.settings.get("shots")
            asked = ["--tasks", ",".join(tasks)] + (["--limit", limit] if limit else [])
            asked += ["--shots", shots] if shots else []
            asked += ["--stability"] if cell.measured.stability() is not None else []
        texts = _texts(next(iter(read.values())).texts | {"source": ",".join(read)}) if read else []
        lines.append(_words("secateur", "eval", model, *against, *texts, *asked, "-o", "eval/"))
    timed = [one.settings for one in cell.measured.results if one.measure == "decode_tokens_per_second"]
    if timed:
        batches, prompts = (sorted({one[name] for one in timed if name in one}) for name in ("batch", "prompt"))
        asked = ["--batch-sizes", ",".join(map(str, batches)), "--prompts", ",".join(map(str, prompts))]
        asked += ["--new-tokens", timed[0]["new_tokens"]] if "new_tokens" in timed[0] else []
        for name in ("repeats", "warmup"):
            asked += [f"--{name}", timed[0][name]] if name in timed[0] else []
        lines.append(_words("secateur", "bench", model, *against, *asked, "-o", "bench/"))
    return lines


def _texts(texts: dict[str, Any]) -> list[object]:
    words: list[object] = []
    for option, name in (("--texts", "source"), ("--windows", "windows"), ("--seq-len", "seq_len")):
        if texts.get(name) is not None:
            words += [option, texts[name]]
    return words


def _words(*words: object) -> str:
    return shlex.join(str(word) for word in words)

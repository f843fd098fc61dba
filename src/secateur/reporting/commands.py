"""The commands that make a cell again, from what its files say."""

from __future__ import annotations

import shlex
from typing import Any

from secateur.plan import Plan
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
    """Give the command lines for one cell: the whole recipe where there is one, and each stage by itself."""
    lines = []
    if cell.recipe is not None:
        lines.append(_words("secateur", "run", cell.recipe, "-o", f"again/{cell.name}"))
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
    steps = plan.steps
    methods = list(dict.fromkeys(step.method for step in steps))
    settings = steps[0].settings if len(methods) == 1 else {}
    asked = [word for name, value in plan.requested.items() if name in _OPTIONS and value is not None
             for word in (_OPTIONS[name], value)]  # fmt: skip
    texts = _texts(plan.texts) if plan.texts else []
    chosen = [word for name, value in settings.items() if value is not None
              for word in ("--set", f"{name}={value}")]  # fmt: skip
    named = plan.requested.get("methods") or ",".join(methods) or "last-n"
    return _words(
        "secateur", "plan", model, "--method", named, *asked, *chosen, *texts, "--seed", plan.seed, "-o", file
    )


def _heal_line(facts: dict[str, Any], model: str) -> str:
    texts = facts.get("texts") or {}
    learnt = ["--texts", texts["source"]] if "source" in texts else []
    length = ["--seq-len", texts["seq_len"]] if texts.get("seq_len") else []
    tokens = texts.get("windows", 0) * texts.get("seq_len", 0)
    amount = ["--tokens", tokens] if tokens else []
    teacher = ["--teacher", facts["teacher"]["source"]] if "teacher" in facts else []
    settings = [word for name, value in (facts.get("settings") or {}).items() for word in ("--set", f"{name}={value}")]
    seed = ["--seed", facts.get("seed", 0)]
    how = ["--with", facts.get("with", "lora")]
    return _words(
        "secateur", "heal", model, *how, *learnt, *amount, *length, *teacher, *settings, *seed, "-o", "healed/"
    )


def _measuring_lines(contents: Contents, cell: Cell, model: str) -> list[str]:
    lines = []
    against = ["--against", contents.model] if model != contents.model else []
    read, tasks = cell.measured.perplexity(), cell.measured.tasks()
    if read is not None or tasks:
        asked = []
        if tasks:
            one = next(one for one in cell.measured.results if one.task == tasks[0])
            limit = one.settings.get("limit")
            asked = ["--tasks", ",".join(tasks)] + (["--limit", limit] if limit else [])
            asked += ["--stability"] if cell.measured.stability() is not None else []
        texts = _texts(read.texts) if read is not None else []
        lines.append(_words("secateur", "eval", model, *against, *texts, *asked, "-o", "eval/"))
    timed = [one.settings for one in cell.measured.results if one.measure == "decode_tokens_per_second"]
    if timed:
        batches, prompts = (sorted({one[name] for one in timed if name in one}) for name in ("batch", "prompt"))
        asked = ["--batch-sizes", ",".join(map(str, batches)), "--prompts", ",".join(map(str, prompts))]
        asked += ["--new-tokens", timed[0]["new_tokens"]] if "new_tokens" in timed[0] else []
        asked += ["--repeats", timed[0]["repeats"]] if "repeats" in timed[0] else []
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

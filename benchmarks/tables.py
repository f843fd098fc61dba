"""Fill the tables in the README and in docs/ from what was measured and from the code, so that no number is typed.

`python benchmarks/tables.py` writes what stands between `<!-- table: … -->` and `<!-- end of table -->` anew:

* `settings NAME`: settings of a method or of a way of healing, with defaults;
* `measured NAME`: perplexity of the bundled model under that method, from `results/*_table.jsonl`;
* `comparison`: all methods beside each other; `healing`: all ways of healing by tokens;
* `searched`: `auto` and the single methods it tried; `quantised`, `stability`;
* `probes`: what cuts of a real model can still do, beside their perplexity;
* `robustness`: what came of mutated files and of killed commands;
* `study SHARE`: every method on a real model at one share of the parameters; `calibrated`: on how many windows;
  `healed`: ways of healing its cuts;
* `released SHARE`: methods written plainly from their papers beside secateur's;
* `profile MODEL`: where the time of each method goes;
* `merged`: what each rule of `swm` makes of the same windows of a real model;
* `ablation`: what each choice of a width repair is worth on a real model; `allocation`: of widths and branches;
* `stand-ins`: what low-rank pairs in place of branches are worth;
* `experts`: what fewer experts cost a small trained mixture; `families`: what works on which family.

Where something was measured several times, the last line counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import family_table
import real_tables
from table_parts import Record, markdown, number, per_cent, recorded, word

from secateur.healing.recipes import HEALING_RECIPES
from secateur.methods.method import METHODS

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
SHARES = (0.15, 0.22, 0.30)
"""Shares of the parameters in the comparison; a result within five points of one stands in its column."""

Variant = tuple[tuple[str, Any], ...]
"""Settings of a method that a benchmark gave, as pairs."""


def main() -> None:
    """Fill every table of the README and in docs/."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            page.write_text(filled(text), encoding="utf-8")
            print(page.relative_to(ROOT))


def filled(text: str) -> str:
    """Return a page with its tables as they should be."""
    return MARKED.sub(lambda found: f"{found[1]}{_table(found[2])}\n{found[3]}", text)


def _table(what: str) -> str:
    kind, _, name = what.partition(" ")
    return _KINDS[kind](*([name] if name else []))


def settings(name: str) -> str:
    """List the settings of a method or way of healing, with defaults."""
    fields = (METHODS.get(name) or HEALING_RECIPES[name]).settings.model_fields
    return markdown(
        ("setting", "default", "meaning"),
        ((f"`{key}`", _default(one.default), one.description or "") for key, one in fields.items()),
    )


def measured(name: str) -> str:
    """Return every measurement of a method: settings by amounts."""
    variants = _variants(name)
    if not variants:
        return "Not measured yet."
    amounts = sorted({amount for cells in variants.values() for amount in cells})
    by_blocks = all(isinstance(amount, int) for amount in amounts)
    head = [f"{amount} block{'s' * (amount > 1)}" if by_blocks else per_cent(amount) for amount in amounts]
    rows = []
    for variant, cells in variants.items():
        rows.append([_label(variant), *(_cell(cells.get(amount), by_blocks) for amount in amounts)])
        if any("healed" in cell["found"] for cell in cells.values()):
            healed = [cells[amount]["found"].get("healed") if amount in cells else None for amount in amounts]
            rows.append(["… healed", *(number(value) for value in healed)])
    return "\n\n".join([markdown(("settings", *head), rows), _caption(variants.values(), by_blocks)])


def comparison() -> str:
    """Put all methods beside each other at about equal shares of the parameters."""
    rows = []
    for name in METHODS:
        variants = _variants(name)
        default = {variant: cells for variant, cells in variants.items() if _is_default(name, variant)}
        for variant, cells in (default or variants).items():
            label = f"[`{name}`](methods/{name}.md)" + (f", {_label(variant)}" if not default else "")
            rows.append([label, *(_nearest(cells.values(), share) for share in SHARES)])
    table = markdown(("method", *(f"about {per_cent(share, 0)}" for share in SHARES)), rows)
    return "\n\n".join([table, _healing_note(recorded("methods_table"))]).rstrip()


def healing() -> str:
    """Return what each healing recipe recovers: perplexity, the share of the gap that is closed, seconds."""
    found: dict[str, dict[int, dict[str, Record]]] = {}
    for one in recorded("healing_table"):
        setting = one["setting"]
        found.setdefault(setting["cut"], {}).setdefault(setting["tokens"], {})[setting["recipe"]] = one
    recipes = [
        name
        for name in HEALING_RECIPES
        if any(name in cells for amounts in found.values() for cells in amounts.values())
    ]
    rows = []
    for cut, amounts in found.items():
        first = next(iter(next(iter(amounts.values())).values()))
        given = {k: v for k, v in first["setting"].items() if k not in ("cut", "removed", "recipe", "tokens")}
        how = ", ".join([f"`{cut}`", *(f"`{key}={word(value)}`" for key, value in given.items())])
        removed = first["setting"]["removed"]
        label = f"{per_cent(removed)} gone by {how}" if removed else "the dense model, given the same training"
        rows.append([f"{label}: {number(first['found']['before'])}", *[""] * (1 + len(recipes))])
        for tokens in sorted(amounts):
            rows.append(["", f"{tokens:,}", *(_healed(amounts[tokens].get(name)) for name in recipes)])
    return markdown(("", "tokens", *(f"`{name}`" for name in recipes)), rows)


def quantised() -> str:
    """Return what int8 weights cost: perplexity and bytes."""
    rows = []
    for one in recorded("quantise_table"):
        found, name = one["found"], one["setting"]["method"]
        rows.append(
            [
                f"`{name}`" if name in METHODS else name,
                per_cent(found["removed"]),
                number(found["perplexity"]),
                number(found["int8"]),
                f"{found['bytes']:,}",
                f"{found['int8_bytes']:,}",
            ]
        )
    return markdown(("model", "removed", "perplexity", "… with int8", "bytes of weights", "… with int8"), rows)


def stability() -> str:
    """Return accuracy, stability and flips on `stdlib-cloze`."""
    rows = []
    for one in recorded("stability_table"):
        found, given = one["found"], dict(one["setting"])
        name, blocks = given.pop("method"), given.pop("blocks", None)
        more = "".join(f", `{key}={word(value)}`" for key, value in given.items())
        label = f"`{name}`{more}, {blocks} of 12 blocks" if blocks else name
        kept = (found.get("stability", 1.0), found.get("flips", 0.0))
        accuracy = f"{found['acc']:.3f} ± {found['stderr']:.3f}"
        rows.append([label, accuracy, *(f"{value:.3f}" for value in kept)])
    return markdown(("model", "`acc`", "stability", "flips"), rows)


def robustness() -> str:
    """Return what came of mutated files and of commands killed at random moments."""
    rows = []
    for one in recorded("robustness"):
        setting, found = one["setting"], one["found"]
        if setting["run"] == "mutations":
            label = f"{found['mutations']:,} mutations of {setting['kinds']} kinds of file, seed {setting['seed']}"
            refused = f"{found['refused']:,} refused with one message, {found['accepted']:,} read"
            rows += [
                [label, refused],
                ["… tracebacks", str(found["tracebacks"])],
                ["… crashes", str(found["crashes"])],
                [f"… longer than {setting['limit']} seconds", str(found["hangs"])],
                ["… the slowest", f"{found['slowest_seconds']:.1f} seconds"],
            ]
        else:
            names = ", ".join(setting["commands"])
            early = f"{found['ended_before']} of them after the command had ended"
            rows += [
                [f"{found['kills']} kills of {names}, seed {setting['seed']}", early],
                ["… files that differ from those of an undisturbed run", str(found["differences"])],
                ["… files left over after the second run", str(found["left_over"])],
                ["… earlier results lost in between", str(found["lost_targets"])],
                ["… processes that went on without their parent", str(found["surviving_processes"])],
                ["… second runs that failed", str(found["failed_reruns"])],
            ]
    return markdown(("", "found"), rows)


def experts() -> str:
    """Put the ways to have fewer experts beside each other: perplexity on both texts, and the mean of their ratios."""
    found: dict[str, dict[int, Record]] = {}
    for one in recorded("experts_table"):
        found.setdefault(one["setting"]["method"], {})[one["setting"]["experts"]] = one["found"]
    counts = sorted({count for cells in found.values() for count in cells}, reverse=True)
    rows = [[_expert_label(label), *(_on_both(cells.get(count)) for count in counts)] for label, cells in found.items()]
    return markdown(("", *(f"{count} of 16" for count in counts)), rows)


def _expert_label(label: str) -> str:
    method, _, more = label.partition(" ")
    name = f"`{method}`" if method in METHODS else method
    if more == "router":
        return f"{name}, healed with `router`"
    return f"{name}, `{more}`" if more else name


def _on_both(found: Record | None) -> str:
    if found is None:
        return "–"
    return f"{found['python-stdlib']:.1f}, {found['python-docs']:.1f} (× {found['ratio']:.3f})"


def searched() -> str:
    """Put `auto` beside the single methods it tried: perplexity, plans measured, processor seconds."""
    found: dict[str, dict[float, Record]] = {}
    for one in recorded("auto_table"):
        if "depth" not in one["setting"]:
            found.setdefault(one["setting"]["method"], {})[one["setting"]["remove"]] = one["found"]
    auto = found.pop("auto")
    amounts = sorted(auto)
    alone = sorted(found, key=lambda name: found[name][amounts[0]]["perplexity"])
    rows = [
        [f"`{name}`", *(_perplexity(cells.get(amount)) for amount in amounts)]
        for name, cells in (("auto", auto), *((name, found[name]) for name in alone))
    ]
    counts = [(auto[amount]["trials"], sum("refused" in one for one in auto[amount]["tried"])) for amount in amounts]
    rows.append(["plans measured, and passed over unmeasured", *(f"{tried}, {left}" for tried, left in counts)])
    rows.append(["processor seconds, one thread", *(f"{auto[amount]['processor_s']:.0f}" for amount in amounts)])
    return markdown(("method", *(per_cent(amount, 0) for amount in amounts)), rows)


def _perplexity(found: Record | None) -> str:
    return "–" if found is None else f"{found['perplexity']:.2f} ({per_cent(found['removed'])})"


def families() -> str:
    """Return what works on which family, and which are not opened."""
    head, *rows = family_table.rows()
    return f"{family_table.summary()}\n\n{markdown(head, rows)}"


_KINDS: dict[str, Callable[..., str]] = {
    "settings": settings,
    "measured": measured,
    "comparison": comparison,
    "healing": healing,
    "searched": searched,
    "quantised": quantised,
    "stability": stability,
    "probes": real_tables.probes,
    "robustness": robustness,
    "study": real_tables.study,
    "calibrated": real_tables.calibrated,
    "healed": real_tables.healed,
    "ablation": real_tables.ablation,
    "merged": real_tables.merged,
    "allocation": real_tables.allocation,
    "stand-ins": real_tables.stand_ins,
    "released": real_tables.released,
    "profile": real_tables.profile,
    "experts": experts,
    "families": families,
}


def _variants(method: str) -> dict[Variant, dict[Any, Record]]:
    """Return a method's measurements by settings and amount (blocks, or share of the parameters)."""
    found: dict[Variant, dict[Any, Record]] = {}
    for name in ("methods_table", "slicing_table", "width_table"):
        for one in recorded(name):
            given = dict(one["setting"])
            if given.pop("method") != method or "perplexity" not in one["found"]:
                continue
            amount = given.pop("blocks", None) if "blocks" in given else given.pop("remove")
            if method == "streamline":
                given.setdefault("network", "none")  # measured before there were networks
            variant = tuple((key, value) for key, value in given.items() if key not in ("windows", "healing"))
            found.setdefault(variant, {})[amount] = one
    return found


def _is_default(method: str, variant: Variant) -> bool:
    fields = METHODS[method].settings.model_fields
    return all(key in fields and fields[key].default == value for key, value in variant)


def _nearest(cells: Iterable[Record], share: float) -> str:
    near = min(cells, key=lambda one: abs(one["found"]["removed"] - share))["found"]
    if abs(near["removed"] - share) > 0.05:
        return "–"
    healed = f" → {near['healed']:.2f}" if "healed" in near else ""
    return f"{near['perplexity']:.2f}{healed} ({per_cent(near['removed'])})"


def _cell(one: Record | None, by_blocks: bool) -> str:
    if one is None:
        return "–"
    found = one["found"]
    more = ", ".join(map(str, found["gone"])) if by_blocks else per_cent(found["removed"])
    return f"{found['perplexity']:.2f} ({more})"


def _caption(variants: Iterable[dict[Any, Record]], by_blocks: bool) -> str:
    records = [one for cells in variants for one in cells.values()]
    dense = {one["found"]["dense"] for one in records}
    brackets = "the blocks that are gone" if by_blocks else "the share of all parameters that is really gone"
    first = f"Held-out perplexity of the bundled model; dense: {', '.join(map(number, dense))}. In brackets {brackets}."
    return " ".join([first, _healing_note(records)]).rstrip()


def _healing_note(records: Iterable[Record]) -> str:
    ways = {json.dumps(one["setting"]["healing"]) for one in records if "healing" in one["setting"]}
    said = [f"{way['tokens']:,} tokens by `{way['by']}`" for way in map(json.loads, sorted(ways))]
    return f"Healed: {', '.join(said)}." if said else ""


def _healed(one: Record | None) -> str:
    if one is None:
        return "–"
    found = one["found"]
    gap = found["before"] - found["dense"]
    closed = f"{per_cent((found['before'] - found['perplexity']) / gap, 0)}, " if gap > 0 else ""
    return f"{found['perplexity']:.2f} ({closed}{found['seconds']} s)"


def _label(variant: Variant) -> str:
    return ", ".join(f"`{key}={word(value)}`" for key, value in variant) or "as it is"


def _default(value: Any) -> str:
    return "not set" if value is None else f"`{word(value)}`"


if __name__ == "__main__":
    main()

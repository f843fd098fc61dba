"""Tables of real models: what methods, repairs and healing do to SmolLM2-135M-Instruct on three kinds of text."""

from __future__ import annotations

import math
import statistics

from common import LENGTH
from table_parts import Record, markdown, number, per_cent, recorded

from secateur.evaluation.probes import PROBES

SOURCES = {"wikitext": "WikiText-2", "prose": "prose", "code": "code"}
"""What real models are judged on, as results name it and as tables do."""
STUDIED = 32
"""Windows of calibration of the study in the tables."""
TASK = "stdlib-cloze"
HEALED = 20_000
"""Tokens of healing in the table of the study."""
_RUINED, _LARGEST = 1000, 99.0


def probes() -> str:
    """Put perplexity ratios beside the accuracy of each probe, and what a gate says."""
    floors = [f"{probe.chance:.2f}" for probe in PROBES.values()]
    rows = [["guessing (the floor)", "", "", "", *floors, ""]]
    for one in recorded("probes"):
        asked, found = one["setting"], one["found"]
        ratios, right = found.get("ratios", {}), found["accuracy"]
        method, _, more = asked["model"].partition(", ")
        label = f"`{method}`{', ' if more else ''}{more}" if ratios else "dense"
        read = [f"{ratios[source]:.2f}" if ratios else "1" for source in ("python-stdlib", "python-docs")]
        kept = [f"{right[name]:.2f}" if name in right else "–" for name in PROBES]
        gate = ("fails" if found["fails"] else "passes") if "gate" in found else ""
        rows.append([label, per_cent(found["removed"]) if ratios else "", *read, *kept, gate])
    names = [name.removeprefix("probe-") for name in PROBES]
    return markdown(("model", "removed", "× code", "× prose", *names, "`--gate probes:0.9`"), rows)


def ablation() -> str:
    """List the variants of a width repair, with perplexity ÷ that of the dense model on each source."""
    rows = []
    for one in recorded("repair_ablation"):
        asked, found = one["setting"], one["found"]
        at_once = " (sums of the dense model, all blocks at once)" if "measured_on" in asked else ""
        ratios = [found["ratios"][source] for source in SOURCES]
        rows.append(
            (
                f"`{asked['variant']}`{at_once}",
                str(asked["windows"]),
                *(f"{ratio:.2f}" for ratio in ratios),
                f"{found['geometric_mean']:.3f}",
            )
        )
    rows.sort(key=lambda row: ("at once" in row[0], -float(row[-1])))
    return markdown(("variant", "windows", *SOURCES.values(), "geometric mean"), rows)


def merged() -> str:
    """Put the rules of `swm` beside each other on the same windows of blocks: perplexity ratios by source."""
    by_windows: dict[str, dict[str, Record]] = {}
    for one in recorded("merge_rules"):
        by_windows.setdefault(one["setting"]["windows"], {})[one["setting"]["rule"]] = one["found"]
    rules = list(next(iter(by_windows.values()), {}))
    rows = [[f"`{rule}`", *(_merged(found[rule]) for found in by_windows.values())] for rule in rules]
    windows = [", ".join(" to ".join(one.split("-")) for one in text.split(",")) for text in by_windows]
    return markdown(("`rule`", *windows), rows)


def _merged(found: Record) -> str:
    return f"{_ratio(found['geometric_mean'])} ({', '.join(map(_ratio, found['ratios'].values()))})"


def study(removed: str) -> str:
    """Put the methods beside each other at one share: ratios by source, after healing too, seconds and memory."""
    records = [one for one in recorded("real_study") if one["setting"].get("remove") == float(removed)]
    healed = {one["setting"]["case"]: one["found"] for one in records if _is_plain(one["setting"].get("healing"))}
    right = _answered(float(removed))
    rows = []
    for one in records:
        found, case = one["found"], one["setting"]["case"]
        if not _is_cut(one["setting"]) or one["setting"]["windows"] != STUDIED:
            continue
        if "refused" in found:
            rows.append((math.inf, [_case(case), "refused", *[""] * 8]))
            continue
        healed_mean = number(healed[case]["geometric_mean"] if case in healed else None)
        cost = [f"{found['seconds']:.0f} s", f"{found['peak_bytes'] / 2**30:.1f} GiB"]
        rows.append(
            (
                found["geometric_mean"],
                [
                    _case(case) + _length(one["setting"]),
                    per_cent(found["removed"]),
                    *_by_source(found),
                    healed_mean,
                    number(right.get(case)),
                    *cost,
                ],
            )
        )
    rows += [(0.0, ["dense", "", *["1"] * 4, "", number(value), "", ""]) for value in _answered(0.0).values()]
    head = ("method", "removed", *SOURCES.values(), "mean", "mean, healed", f"`{TASK}`", "time", "peak memory")
    return markdown(head, [row for _, row in sorted(rows, key=lambda pair: pair[0])])


def calibrated() -> str:
    """List the cuts that were calibrated on several numbers of windows."""
    records = [one for one in recorded("real_study") if _is_cut(one["setting"]) and "ratios" in one["found"]]
    counts: dict[tuple[str, float], set[int]] = {}
    for one in records:
        counts.setdefault((one["setting"]["case"], one["setting"]["remove"]), set()).add(one["setting"]["windows"])
    rows = []
    for one in records:
        asked, found = one["setting"], one["found"]
        if len(counts[asked["case"], asked["remove"]]) > 1:
            key = (asked["remove"], asked["case"], asked["windows"])
            cut = [_case(asked["case"]), per_cent(found["removed"]), str(asked["windows"])]
            rows.append((key, [*cut, *_by_source(found), f"{found['seconds']:.0f} s"]))
    head = ("method", "removed", "windows", *SOURCES.values(), "mean", "time")
    return markdown(head, [row for _, row in sorted(rows)])


def healed() -> str:
    """List what healing brings to cuts of a real model: recipe, tokens, texts, and the ratios on each source."""
    records = recorded("real_study")
    before = {
        (one["setting"]["case"], one["setting"].get("remove")): one["found"]
        for one in records
        if _is_cut(one["setting"]) and one["setting"].get("windows") == STUDIED and "ratios" in one["found"]
    }
    rows = []
    for one in records:
        asked = one["setting"].get("healing")
        if asked is None:
            continue
        name = one["setting"]["case"]
        cut = before.get((name, one["setting"]["remove"]))
        label = f"{_case(name)}, {per_cent(cut['removed'])} gone" if cut else "dense"
        was = f"{cut['geometric_mean']:.2f}" if cut else "1"
        how = [f"`{asked['with']}`", f"{asked['tokens']:,}", f"`{asked['texts']}`"]
        rows.append([label, *how, was, *_by_source(one["found"]), f"{one['found']['seconds']:.0f} s"])
    rows.sort(key=lambda row: row[0])
    return markdown(("cut", "recipe", "tokens", "texts", "mean before", *SOURCES.values(), "mean", "time"), rows)


def _is_cut(setting: Record) -> bool:
    """Return whether a cut was judged as it is, neither healed nor asked."""
    return "healing" not in setting and "questions" not in setting


def _answered(removed: float) -> dict[str, float]:
    """Return the accuracy of the cuts at one share that were asked; at 0 that of the dense model."""
    return {
        one["setting"]["case"]: one["found"][TASK]
        for one in recorded("real_study")
        if "questions" in one["setting"] and one["setting"]["remove"] == removed
    }


def _length(setting: Record) -> str:
    """Name the windows, where they are not those of the others."""
    length = setting.get("seq_len", LENGTH)
    return "" if length == LENGTH else f", {setting['windows']} windows of {length}"


def _is_plain(healing: Record | None) -> bool:
    return healing is not None and healing == {"with": "lora", "tokens": HEALED, "texts": "diverse"}


def _case(case: str) -> str:
    method, _, more = case.partition(", ")
    return f"`{method}`" + (f", `{more}`" if more else "")


def _by_source(found: Record) -> list[str]:
    """Return the ratios of each source, and their geometric mean."""
    ratios = (*(found["ratios"][source] for source in SOURCES), found["geometric_mean"])
    return [_ratio(one) for one in ratios]


def _ratio(value: float) -> str:
    return number(value) if value < _RUINED else f"> {_RUINED:,}"


def allocation() -> str:
    """List uniform and allocated widths, branches and blocks by the share removed: mean ratio, then each source."""
    cells: dict[str, dict[float, Record]] = {}
    for one in recorded("allocation"):
        cells.setdefault(one["setting"]["case"], {})[one["setting"]["remove"]] = one["found"]
    amounts = sorted({amount for row in cells.values() for amount in row})

    def cell(found: Record | None) -> str:
        if found is None:
            return "–"
        each = ", ".join(f"{found['ratios'][source]:.2f}" for source in SOURCES)
        return f"{found['geometric_mean']:.2f} ({each})"

    rows = [[f"`{case}`", *(cell(row.get(amount)) for amount in amounts)] for case, row in cells.items()]
    return markdown(("", *(f"{amount:.0%}" for amount in amounts)), rows)


def stand_ins() -> str:
    """Put branches without and with low-rank pairs in their place beside each other."""
    rows = []
    for one in recorded("stand_ins"):
        asked, found = one["setting"], one["found"]
        ranks = sorted(found["ranks"])
        each = [f"{value:.3f}" for value in (*(found["ratios"][source] for source in SOURCES), found["geometric_mean"])]
        rows.append(
            [
                asked["model"],
                per_cent(asked["remove"], 0),
                asked["stand_ins"],
                str(found["branches"]),
                f"{ranks[0]} to {ranks[-1]}" if ranks[-1] else "–",
                per_cent(found["removed"]),
                *each,
            ]
        )
    head = ("model", "asked", "in place of branches", "branches", "ranks", "removed", *SOURCES.values(), "mean")
    return markdown(head, rows)


def released(removed: str) -> str:
    """Put methods written plainly from their papers beside secateur's at one share of the parameters."""
    records = recorded("released_methods")
    dense = {one["setting"]["model"]: one["found"]["loss"] for one in records if one["setting"]["side"] == "dense"}
    rows = []
    for one in records:
        asked, found = one["setting"], one["found"]
        if asked.get("remove") != float(removed):
            continue
        change = [found["loss"][source] - dense[asked["model"]][source] for source in SOURCES]
        ratios = [*change, sum(change) / len(change)]
        rows.append(
            [
                f"`{found['method']}`{_length(asked)}",
                "as in the paper" if asked["side"] == "plain" else "secateur",
                per_cent(found["removed"]),
                *(_ratio(math.exp(min(value, _LARGEST))) for value in ratios),
                f"{found['processor_s']:.0f} s",
                f"{found['peak_bytes'] / 2**30:.1f} GiB",
            ]
        )
    if not rows:
        return "Not measured yet."
    head = ("method", "made by", "removed", *SOURCES.values(), "mean", "processor time", "peak memory")
    return markdown(head, rows)


def profile(model: str) -> str:
    """List where the processor time of each method goes, and the announced time ÷ that."""
    measured = [one for one in recorded("profile_methods") if one["setting"]["model"] == model]
    texts = [f"{one['setting']['windows']} windows of {one['setting']['seq_len']}" for one in measured]
    usual, rows = statistics.mode(texts), []
    for one, text in zip(measured, texts, strict=True):
        found = one["found"]
        if "refused" in found:
            continue
        name = f"`{one['setting']['method']}`" + (f", {text}" if text != usual else "")
        total = sum(found["seconds"].values())
        shares = [f"{100 * value / max(total, 0.01):.0f} %" for value in found["seconds"].values()]
        announced = number(found["announced_over_happened"]) if found["announced"] else "–"
        rows.append([name, f"{total:.1f} s", *shares, announced])
    head = ("method", "time", "forward", "backward", "sums", "solve", "disk", "other", "announced ÷ taken")
    return markdown(head, rows)

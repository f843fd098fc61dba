"""Read the folders that commands wrote. Folders of another format version are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.checkpoints.folders import MARKER, read_record
from secateur.errors import InputError, first_line
from secateur.evaluation.gate import Gate, accuracies_in
from secateur.evaluation.reference import RESULTS
from secateur.evaluation.results import Result, read_results
from secateur.experiments.recipe import read_recipe
from secateur.experiments.state import CELLS, CUT, DENSE, HEALED, PLAN, RECIPE, SAMPLES, SCORES, SPEEDS, STATE, State
from secateur.plan.plan import Plan, plans_in
from secateur.reading import MIB, FileKind
from secateur.reporting.cells import Cell, Contents, Failure, Measured, Sample, amount_of, method_of
from secateur.scores.profile import Scores

SAMPLES_FILE = FileKind("list of samples", 64 * MIB)
_AMOUNTS = ("remove", "blocks", "slice", "target_params", "target_memory", "target_speedup")


def read_folder(folder: str | Path, gate: str | None = None) -> Contents:
    """Read a study, a run, a demo, a checkpoint, or a folder with scores, a plan or results.

    Args:
        folder: the folder.
        gate: what the cells must not have lost; None is the gate of the recipe there, if it has one.

    Raises:
        InputError: no folder, nothing in it that a report can show, files of another format version, or a gate whose
            probes the dense model was not asked, or can do none of.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}; name a folder that secateur wrote, such as a study or a run.")
    record = _record(folder)
    if (folder / CELLS).is_dir():
        State.of(folder)
        cells = _told_apart([_cell(one) for one in sorted((folder / CELLS).iterdir()) if (one / STATE).is_file()])
        dense = _measured(folder / DENSE, "against") or Measured()
    else:
        one = _cell(folder)
        cells = [one] if _has_content(one) else []
        dense = _dense_beside(folder)
    scores = Scores.read(folder / SCORES) if (folder / SCORES).is_file() else None
    if not cells and scores is None:
        raise InputError(
            f"{folder}: nothing to report: no cells, plan.json, scores.json, results.jsonl or pruned checkpoint. "
            "Name a folder written by compare, run, demo, score, prune, heal, eval or bench."
        )
    return Contents(
        kind=str(record.get("command") or ("prune" if "history" in record else "folder")),
        folder=folder,
        model=_model(record, cells, dense, scores),
        cells=tuple(cells),
        dense=dense,
        scores=scores,
        versions=_versions(record, cells),
        gate=_gate(folder, gate, dense),
    )


def _gate(folder: Path, asked: str | None, dense: Measured) -> Gate | None:
    """Return the gate, if the dense model has done its probes.

    Raises:
        InputError: it was asked for here, and cannot be used.
    """
    before = accuracies_in(dense.results)
    if asked is None:
        planned = (_asked(folder).get("eval") or {}).get("gate")
        gate = None if planned is None else Gate.read(planned)
        return gate if gate is not None and set(gate.probes) <= set(before) else None
    gate = Gate.read(asked)
    missing = [name for name in gate.probes if name not in before]
    if missing:
        raise InputError(
            f"{folder}: {', '.join(missing)} not measured on the dense model, so there is no gate {gate}; "
            f"make the study with it (compare --gate {gate}), or evaluate with --tasks probes --against MODEL."
        )
    gate.require(before)
    return gate


def _cell(folder: Path) -> Cell:
    state = State.of(folder)
    asked = _asked(folder)
    stages = state.stages
    cut = folder / str(stages.get("prune", {}).get("cut", CUT))
    made = (cut, folder) if asked and "heal" not in asked else (folder / HEALED, cut, folder)
    checkpoint = next((one for one in made if (one / "config.json").is_file()), None)
    record = _record(checkpoint) if checkpoint else {}
    history = record.get("history", [])
    plans = _plans(history, checkpoint)
    if not plans and (folder / PLAN).is_file():
        plans = (Plan.read(folder / PLAN),)
    healed = tuple(entry["healing"] for entry in history if "healing" in entry)
    if not healed and "heal" in asked and "facts" in stages.get("heal", {}):  # the checkpoints were not kept
        healed = (stages["heal"]["facts"],)
    measured = _measured(folder, "model") or Measured()
    some = next(iter(measured.results), None)
    dense = next(iter(_results_in(folder, "against")), None)
    removed, parameters, blocks = None, some.parameters if some else None, some.blocks if some else None
    if plans:
        parameters, blocks = plans[-1].parameters_after, len(plans[-1].kept_blocks())
        removed = 1 - parameters / plans[0].parameters_before
    elif some and dense:
        removed = 1 - some.parameters / dense.parameters
    prune, heal = (one if isinstance(one := asked.get(name), dict) else {} for name in ("prune", "heal"))
    requested = plans[-1].requested if plans else {name: prune[name] for name in _AMOUNTS if name in prune}
    return Cell(
        name=state.name or folder.resolve().name,
        folder=folder,
        method=str(prune.get("method") or (method_of(plans) if plans else some.model if some else folder.name))
        + _settings(prune),
        amount=amount_of(requested),
        healing=" + ".join(str(facts.get("with")) for facts in healed) or heal.get("with"),
        plans=plans,
        healed=healed,
        measured=measured,
        removed=removed,
        parameters=parameters,
        blocks=blocks,
        seconds={name: float(stage["seconds"]) for name, stage in stages.items() if "seconds" in stage},
        checked=record["check"].get("passed") if isinstance(record.get("check"), dict) else None,
        recipe=folder / RECIPE if (folder / RECIPE).is_file() else None,
        checkpoint=checkpoint,
        failure=_failure(state),
    )


def _told_apart(cells: list[Cell]) -> list[Cell]:
    """Omit the settings from a method's name if they are the same in all its cells."""
    names: dict[str, set[str]] = {}
    for cell in cells:
        names.setdefault(cell.method.partition(" (")[0], set()).add(cell.method)
    plain = {next(iter(full)): name for name, full in names.items() if len(full) == 1}
    return [replace(cell, method=plain.get(cell.method, cell.method)) for cell in cells]


def _settings(prune: dict[str, Any]) -> str:
    """Return the settings a recipe gives its method, which distinguish two cells of the same method."""
    given = prune.get("settings")
    return f" ({', '.join(f'{name}={value}' for name, value in given.items())})" if given else ""


def _dense_beside(folder: Path) -> Measured:
    """Read the dense model's measurements, in the folder itself or in the study it is a cell of."""
    whole = folder.resolve()
    if (own := _results_in(folder, "against")) and any(one.measure == "perplexity" or one.task for one in own):
        return Measured(results=own)
    shared = _measured(whole.parent.parent / DENSE, "against") if whole.parent.name == CELLS else None
    return shared or Measured(results=own)


def _has_content(cell: Cell) -> bool:
    return bool(cell.plans or cell.healed or cell.measured.results or cell.failure or cell.seconds or cell.recipe)


def _model(record: dict[str, Any], cells: list[Cell], dense: Measured, scores: Scores | None) -> str:
    for cell in cells:
        if cell.plans:
            return cell.plans[0].model.source
    if scores is not None:
        return scores.model
    asked = next((one["model"] for cell in cells if (one := _asked(cell.folder)) and "model" in one), None)
    named = asked or record.get("base_model") or record.get("against") or record.get("model")
    if named:
        return str(named)
    results = [*dense.results, *(one for cell in cells for one in cell.measured.results)]
    return results[0].model if results else "a model"


def _versions(record: dict[str, Any], cells: list[Cell]) -> dict[str, str]:
    results = [one.versions for cell in cells for one in cell.measured.results]
    return dict(results[-1] if results else record.get("versions", {}))


def _failure(state: State) -> Failure | None:
    return Failure(**state.failed) if state.failed else None


def _asked(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE
    return read_recipe(path).model_dump(mode="json", by_alias=True, exclude_none=True) if path.is_file() else {}


def _measured(folder: Path, role: str) -> Measured | None:
    results = _results_in(folder, role)
    path = folder / SAMPLES
    samples = tuple(_sample(path, one) for one in _samples(path)) if path.is_file() else ()
    return Measured(results=results, samples=samples) if results or samples else None


def _samples(path: Path) -> list[Any]:
    found = SAMPLES_FILE.json(path)
    if not isinstance(found, list):
        raise InputError(f"{path}: not a valid list of samples; generate them again.")
    return found


def _sample(path: Path, one: Any) -> Sample:
    if not isinstance(one, dict) or not {"prompt", "text"} <= set(one):
        raise InputError(f"{path}: a sample needs 'prompt' and 'text'; generate it again.")
    return Sample(**{name: str(one.get(name, "")) for name in ("prompt", "text", "truth")})


def _results_in(folder: Path, role: str) -> tuple[Result, ...]:
    files = (folder / name for name in (RESULTS, SPEEDS))
    return tuple(one for file in files if file.is_file() for one in read_results(file) if one.role == role)


def _plans(history: list[dict[str, Any]], checkpoint: Path | None) -> tuple[Plan, ...]:
    try:
        return plans_in(history)
    except InputError as error:
        raise InputError(
            f"{checkpoint}/{MARKER}: a plan of another version of secateur ({first_line(error)}). "
            "Make the report with the version that wrote it."
        ) from error


def _record(folder: Path) -> dict[str, Any]:
    return read_record(folder)

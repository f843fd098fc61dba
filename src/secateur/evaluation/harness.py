"""Run tasks with EleutherAI's lm-evaluation-harness in this process.

This is the only file that imports the harness, and it is imported late. Some of the harness's behaviour is replaced:
its whole index is only built for names of several tasks, its progress bars are replaced by ours, it does not describe
this machine, and data files of a task folder are looked up next to the YAML file that names them.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval
import lm_eval.api.task as lm_task
import torch
from datasets import Dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import InputError, NumericsError, first_line
from secateur.evaluation import cloze
from secateur.evaluation.catalogue import find_task
from secateur.evaluation.probes import PROBES, Probe, questions
from secateur.evaluation.stability import Answer, Outcome
from secateur.progress import Progress
from secateur.run_options import DEFAULTS, RunOptions

_CHUNK_BATCHES = 8
"""Batches between two updates of the progress bar."""


def load_tasks(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Load tasks: `stdlib-cloze`, names of the harness, folders and YAML files.

    Raises:
        InputError: an unknown name, a folder without tasks, or unavailable data.
    """
    with _quiet():
        loaded = [one for name in names for one in _load(name, tokenizer)]
    return list({_leaf_name(one): one for one in loaded}.values())


def _load(name: str, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    manager = TaskManager(include_defaults=False)
    if name == cloze.NAME:
        return _leaves(manager, [_cloze_config(tokenizer)], name)
    if name in PROBES:
        return _leaves(manager, [_probe_config(PROBES[name])], name)
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix in (".yaml", ".yml"):
        return _load_local(path)
    found = find_task(name)
    if found.kind == "task":
        return _leaves(manager, [str(found.file)], name)
    return _leaves(TaskManager(), [name], name)


def _load_local(path: Path) -> list[Any]:
    """Load all tasks of a folder, or the one in a YAML file, with data files relative to the YAML file."""
    if not path.exists():
        raise InputError(f"{path}: no such file.")
    folder = path if path.is_dir() else path.parent
    manager = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
    found = [
        {"task": name, **_with_data_beside(entry.cfg or {}, entry.yaml_path.parent)}
        for name, entry in manager.task_index.items()
        if name in manager.all_subtasks and (path.is_dir() or entry.yaml_path == path.resolve())
    ]
    if not found:
        raise InputError(f"{path}: no task here; a task is a YAML file in the form of lm-evaluation-harness.")
    return _leaves(manager, [{"group": folder.name, "task": found}], str(path))


def _with_data_beside(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the entries of a task's configuration that name data files, with absolute paths."""
    given = config.get("dataset_kwargs") or {}
    files = given.get("data_files")
    if not files:
        return {}
    return {"dataset_kwargs": given | {"data_files": _located(files, folder)}}


def _located(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _located(one, folder) for split, one in files.items()}
    if isinstance(files, list):
        return [_located(one, folder) for one in files]
    beside = folder / str(files)
    return str(beside) if beside.exists() else files


def _leaves(manager: TaskManager, specs: list[Any], name: str) -> list[Any]:
    """Load specifications and return their tasks, each with its data."""
    try:
        return list(manager.load(specs)["tasks"].values())
    except (ConnectionError, TimeoutError, HTTPError, DatasetsError, OSError) as error:
        raise InputError(
            f"task {name}: its data cannot be loaded ({first_line(error)}). {cloze.NAME} and local folders need no hub."
        ) from error
    except (ImportError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"task {name}: cannot be loaded by lm-evaluation-harness ({first_line(error)}).") from error


def _leaf_name(task: Any) -> str:
    return str(task.task_name)


def _cloze_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    made = cloze.questions(tokenizer)
    rows = [{"context": one.context, "options": list(one.options), "right": one.right} for one in made]
    return _own_config(cloze.NAME, rows, "right") | {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda row: row["options"],
    }


def _probe_config(probe: Probe) -> dict[str, Any]:
    """Return a task whose answer has to be the greedy continuation."""
    rows = [{"context": one.context, "answer": one.answer} for one in questions(probe)]
    own = _own_config(probe.name, rows, "answer")
    return own | {"output_type": _EXACT, "metadata": own["metadata"] | {"floor": round(probe.chance, 4)}}


def _own_config(name: str, rows: list[dict[str, Any]], target: str) -> dict[str, Any]:
    """Return what the tasks that are made here have in common: each row's context, and its target under this key."""
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": lambda row: row["context"],
        "doc_to_target": lambda row: row[target],
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }


_EXACT = "loglikelihood"
"""The harness's type of tasks with one answer, which is right if it is the greedy continuation."""


def is_comparable(task: Any) -> bool:
    """Return whether the answers of two models can be compared question by question, so that stability is defined."""
    return has_options(task) or getattr(task, "OUTPUT_TYPE", None) == _EXACT


def has_options(task: Any) -> bool:
    """Return whether the task is multiple choice, so that stability is defined."""
    return getattr(task, "OUTPUT_TYPE", None) == "multiple_choice" and hasattr(task, "doc_to_choice")


def question_count(task: Any, limit: int | None) -> int:
    """Return the number of questions that will be asked."""
    count = len(task.eval_docs)
    return count if limit is None else min(limit, count)


def run_tasks(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    *,
    limit: int | None,
    shots: int | None,
    options: RunOptions = DEFAULTS,
) -> list[Outcome]:
    """Run all tasks on a model.

    Raises:
        InputError: a task cannot be run like this, for example because it would execute code.
        NumericsError: NaN or infinity among the answers.
    """
    with _quiet():
        model = _Model(module, copy.deepcopy(tokenizer), options.batch_size or 1, options.progress)
        try:
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=TaskManager(include_defaults=False),
                num_fewshot=shots,
                limit=limit,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=options.seed,
                numpy_random_seed=options.seed,
                torch_random_seed=options.seed,
                fewshot_random_seed=options.seed,
            )
        except (ValueError, KeyError, NotImplementedError) as error:
            raise InputError(f"the harness cannot run this: {first_line(error)}") from error
    return [_outcome(task, model, found) for task in tasks]


class _Model(HFLM):
    """The harness's model interface for an open module, with our progress bar; records the tokens of each option."""

    def __init__(
        self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: Progress
    ) -> None:
        super().__init__(
            pretrained=module,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",  # in bfloat16, sums over the tokens of an option would be rounded to quarters
        )
        self._progress = progress
        self.token_counts: dict[tuple[str, str], int] = {}
        """Return the number of tokens of a continuation after its context, as it was scored."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = True, override_bs: Any = None) -> Any:
        self.token_counts |= {pair: len(continuation) for pair, _, continuation in requests}
        size = max(1, _CHUNK_BATCHES * int(self.batch_size))
        chunks = [requests[first : first + size] for first in range(0, len(requests), size)]
        found: list[tuple[float, bool]] = []
        for chunk in self._progress(chunks, "asking", len(chunks)):
            found += super()._loglikelihood_tokens(chunk, disable_tqdm=True, override_bs=override_bs)
        _require_finite([value for value, _ in found], "the answers to the tasks")
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        first = self.tok_encode(requests[0].args[0])[-8:]
        logits = self._model_call(torch.tensor([first], device=self.device))
        _require_finite(logits.float().flatten().tolist(), "the logits")
        return list(super().generate_until(requests, disable_tqdm=True))


def _require_finite(numbers: Iterable[float], what: str) -> None:
    """Raise on NaN or infinity, among which an answer would still be chosen.

    Raises:
        NumericsError: there is one.
    """
    if not all(map(math.isfinite, numbers)):
        raise NumericsError(f"NaN or infinity in {what}; try --dtype float32. If it stays, the weights are damaged.")


def _outcome(task: Any, model: _Model, found: dict[str, Any]) -> Outcome:
    name = _leaf_name(task)
    samples = sorted(found["samples"][name], key=lambda one: (one["filter"], one["doc_id"]))
    metrics, errors = _metrics(found["results"][name], samples)
    put = json.dumps([[list(map(str, pair)) for pair in one["arguments"]] for one in samples])
    return Outcome(
        task=name,
        metrics=metrics,
        errors=errors,
        answers=tuple(_answer(task, one, model) for one in samples) if is_comparable(task) else (),
        settings={
            "task_version": found["versions"].get(name),
            "shots": found["n-shot"].get(name),
            "questions": len({one["doc_id"] for one in samples}),
        }
        | _floor(task),
        fingerprint=hashlib.sha256(put.encode()).hexdigest()[:16],
    )


def _floor(task: Any) -> dict[str, float]:
    """Return the accuracy of guessing, where it is known."""
    floor = (getattr(getattr(task, "config", None), "metadata", None) or {}).get("floor")
    return {} if floor is None else {"floor": floor}


def _metrics(
    reported: Mapping[str, Any], samples: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return a task's metrics and their standard errors; a metric reported by several answer filters names the filter.

    Raises:
        NumericsError: a metric is NaN or infinite.
    """
    keys = [key.partition(",") for key, value in reported.items() if "," in key and isinstance(value, int | float)]
    told = [(metric, kind) for metric, _, kind in keys if not metric.endswith("_stderr")]
    filters = Counter(metric for metric, _ in told)
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for metric, kind in told:
        name = metric if filters[metric] == 1 else f"{metric},{kind}"
        metrics[name] = float(reported[f"{metric},{kind}"])
        error = _standard_error(metric, metrics[name], [one for one in samples if one["filter"] == kind])
        if error is not None:
            errors[name] = error
    for name, value in metrics.items():
        _require_finite([value], f"what the harness reports as {name}")
    return metrics, errors


def _standard_error(metric: str, value: float, samples: Sequence[dict[str, Any]]) -> float | None:
    """Return the standard error of a metric that is a mean over questions, None for any other."""
    each = [one[metric] for one in samples if isinstance(one.get(metric), int | float)]
    if len(each) < max(2, len(samples)):
        return None
    if not math.isclose(statistics.fmean(each), value, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return statistics.stdev(each) / math.sqrt(len(each))


def _answer(task: Any, sample: dict[str, Any], model: _Model) -> Answer:
    """Return the options of one question, without the unconditional ones that mutual information adds."""
    if not has_options(task):
        (pair,), ((value, greedy),) = sample["arguments"][:1], sample["filtered_resps"][:1]
        count = model.token_counts[tuple(pair)]
        return Answer(sums=(float(value),), tokens=(count,), gold=frozenset({0}), exact=bool(greedy))
    choices = task.doc_to_choice(sample["doc"])
    pairs = sample["arguments"][: len(choices)]
    return Answer(
        sums=tuple(float(response[0]) for response in sample["filtered_resps"][: len(choices)]),
        tokens=tuple(model.token_counts[tuple(pair)] for pair in pairs),
        gold=_gold(task, sample["doc"], choices),
    )


def _gold(task: Any, doc: Any, choices: Sequence[str]) -> frozenset[int]:
    """Return the indices of the right options, none if the data names one that does not exist."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    every = gold if isinstance(gold, list) else [gold]
    numbers = [choices.index(one) if isinstance(one, str) and one in choices else one for one in every]
    return frozenset(int(one) for one in numbers if not isinstance(one, str))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from logging, from drawing its own progress bars, and from calling git and pip."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            _replaced(lm_task, tqdm=functools.partial(lm_task.tqdm, disable=True)),
            _replaced(evaluator, get_git_commit_hash=lambda: None, add_env_info=lambda _: None),
        ):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _replaced(module: ModuleType, **others: Any) -> Iterator[None]:
    """Temporarily replace attributes of a module."""
    before = {name: getattr(module, name) for name in others}
    vars(module).update(others)
    try:
        yield
    finally:
        vars(module).update(before)

"""Groups of command-line options shared by several commands, as frozen dataclasses that convert what they hold.

With `grouped`, a command takes such a group as one argument, and Typer sees its fields as options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from secateur.data.texts import Count
from secateur.errors import InputError
from secateur.evaluation.speed import BATCHES, NEW_TOKENS, Timing
from secateur.evaluation.tasks import TaskRequest
from secateur.export.serving import Engine, read_engine, settings_for
from secateur.healing.data import TrainingTexts
from secateur.models.decoder import Decoder
from secateur.models.opening import open_model, open_shapes
from secateur.plan.amount import Amount
from secateur.progress import Progress
from secateur.run_options import RunOptions
from secateur.scores.profile import Scores

Setting = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method (repeatable).")
]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How models are opened."""

    dtype: Annotated[str, typer.Option(help="Arithmetic: auto, float32, bfloat16, float16.")] = "auto"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto"
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None
    skeleton: Annotated[
        bool | None,
        typer.Option(
            "--skeleton/--in-memory", help="Load blocks one at a time, or hold all in memory. (default: by free memory)"
        ),
    ] = None
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer to use instead of the checkpoint's.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights, which can run code.")] = (
        False
    )

    def open(self, source: str, *, only_shapes: bool = False, whole: bool = False, thin: bool = False) -> Decoder:
        """Open a model; `only_shapes` avoids reading weights, `whole` reads all, `thin` reads block by block."""
        skeleton = self.skeleton
        if whole and skeleton is None:
            skeleton = False
        elif thin and not self.allow_pickle:
            skeleton = True
        opening = open_shapes if only_shapes else open_model
        return opening(source, **asdict(self) | {"skeleton": skeleton})


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Texts to read, and how."""

    texts: Annotated[str | None, typer.Option(help="Text source: see `secateur texts`. (default: diverse)")] = None
    windows: Annotated[str, typer.Option(help="Number of windows, 'auto' (as many as needed), or 'all'.")] = "32"
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window. (default: 512, or the model's positions)")] = (
        None
    )
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0
    batch_size: Annotated[int | None, typer.Option(help="Windows per batch. (default: depends on the device)")] = None

    def options(self, progress: Progress, work: Path | None = None) -> RunOptions:
        """Return the run options."""
        return RunOptions(batch_size=self.batch_size, seed=self.seed, progress=progress, work=work)

    def beside_a_plan(self) -> list[str]:
        """Return the given options that a plan already determines."""
        plain = type(self)()
        names = [name for name in ("windows", "seq_len", "seed") if getattr(self, name) != getattr(plain, name)]
        return [f"--{name.replace('_', '-')}" for name in names]

    @property
    def window_count(self) -> Count:
        """Number of windows, None for all, or `auto`.

        Raises:
            InputError: none of these.
        """
        return read_windows(self.windows, "--windows")

    def fields(self) -> dict[str, Any]:
        """Return the texts as arguments of jobs."""
        return {"texts": self.texts, "windows": self.window_count, "seq_len": self.seq_len}


@dataclass(frozen=True, kw_only=True)
class Calibration(Reading):
    """Texts to plan and prune on."""

    windows: Annotated[
        str,
        typer.Option(help="Number of windows, or 'all'; 'auto' is 32, or as many as the repair of a method needs."),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class HeldOut(Reading):
    """Held-out texts to read."""

    texts: Annotated[
        str | None, typer.Option(help="Source of text; several (a,b,c) are measured separately. (default: diverse)")
    ] = None
    windows: Annotated[str, typer.Option(help="Windows of held-out text of each source, 'auto', or 'all'.")] = "64"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Tasks to run."""

    tasks: Annotated[
        str | None,
        typer.Option(help="stdlib-cloze, commonsense, tasks of lm-evaluation-harness, folders: piqa,arc_easy."),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Questions per task. (default: all)")] = None
    shots: Annotated[int | None, typer.Option(help="Examples before each question. (default: set by the task)")] = None
    stability: Annotated[
        bool, typer.Option("--stability", help="Also measure stability and answer flips against the dense model.")
    ] = False

    def request(self) -> TaskRequest | None:
        """Return the requested tasks; None if none are named.

        Raises:
            InputError: an unknown task, a number out of range, or stability without tasks.
        """
        if self.tasks is not None:
            return TaskRequest.of(self.tasks, limit=self.limit, shots=self.shots, stability=self.stability)
        if self.stability:
            raise InputError("stability is measured on tasks; name some, such as stdlib-cloze.")
        return None


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Healing recipe, training texts and settings."""

    with_: Annotated[str, typer.Option("--with", help="lora, last-layers, router, full, distill, blocks.")] = "lora"
    texts: Annotated[str | None, typer.Option(help="Text source: see `secateur texts`. (default: diverse)")] = None
    tokens: Annotated[str, typer.Option(help="Maximum number of training tokens: 500k, 10M.")] = "1M"
    instructions: Annotated[
        bool, typer.Option("--instructions", help="The texts are chats or questions; only answers count in the loss.")
    ] = False
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window. (default: 512, or the model's positions)")] = (
        None
    )
    teacher: Annotated[
        str | None, typer.Option(help="The dense model, for distill and blocks. (default: the model that was pruned)")
    ] = None
    set_: Setting = None
    track: Annotated[
        list[str] | None, typer.Option(help="Also send curves to tensorboard, mlflow or wandb (repeatable).")
    ] = None
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0

    def settings(self) -> dict[str, Any]:
        """Return the settings as typed."""
        return read_pairs(self.set_)

    def options(self, progress: Progress, work: Path) -> RunOptions:
        """Return the run options."""
        return RunOptions(seed=self.seed, progress=progress, work=work)

    def data(self) -> TrainingTexts:
        """Return the training texts."""
        return TrainingTexts(
            source=self.texts, tokens=self.tokens, instructions=self.instructions, seq_len=self.seq_len
        )


@dataclass(frozen=True, kw_only=True)
class AmountOptions:
    """How much to remove, and the method's own settings."""

    remove: Annotated[str | None, typer.Option(help="Share of all parameters to remove: 25% or 0.25.")] = None
    target_params: Annotated[str | None, typer.Option(help="Maximum number of parameters: 5.5B, 350M.")] = None
    target_memory: Annotated[
        str | None, typer.Option(help="Maximum memory of weights and cache: 12GB. See --context.")
    ] = None
    context: Annotated[
        int | None, typer.Option(help="Tokens in the cache that --target-memory counts. (default: 4096, or positions)")
    ] = None
    target_speedup: Annotated[
        str | None, typer.Option(help="Speed-up to reach, by block times measured now on this device: 1.3.")
    ] = None
    blocks: Annotated[int | None, typer.Option(help="Number of blocks to remove.")] = None
    slice_: Annotated[
        str | None, typer.Option("--slice", help="Share of the hidden directions to slice away: 20%.")
    ] = None
    set_: Setting = None
    gate: Annotated[
        str | None, typer.Option(help="auto: keep this share of what the dense model can do: probes:0.9.")
    ] = None
    scores: Annotated[Path | None, typer.Option(help="scores.json measured earlier on this model.")] = None

    def amount(self) -> Amount:
        """Return the amount.

        Raises:
            InputError: several, or a value out of range.
        """
        return Amount.of({name: getattr(self, option) for name, option in _AMOUNTS.items()})

    def settings(self, method: str) -> dict[str, Any]:
        """Return the method's settings as typed.

        Raises:
            InputError: a gate for a method that tries nothing, or one that is given twice.
        """
        typed = read_pairs(self.set_)
        if self.gate is None:
            return typed
        if method != _SEARCH:
            raise InputError(
                f"--gate {self.gate}: {method} makes one plan, so there is none to choose instead; use --method "
                f"{_SEARCH}, or look at what the result can do: secateur eval RESULT --against MODEL --tasks probes."
            )
        if "gate" in typed:
            raise InputError(f"--gate {self.gate} and --set gate={typed['gate']}: give one of them.")
        return typed | {"gate": self.gate}

    def given(self) -> list[str]:
        """Return the given options by name."""
        named = [
            name.replace("slicing", "slice") for name, option in _AMOUNTS.items() if getattr(self, option) is not None
        ]
        more = [*(["gate"] if self.gate else []), *(["set"] if self.set_ else [])]
        return [f"--{name.replace('_', '-')}" for name in (*named, *more)]

    def known_scores(self) -> Scores | None:
        """Read the scores file, if one was given."""
        return Scores.read(self.scores) if self.scores else None


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The engine that is to run the result."""

    for_: Annotated[str | None, typer.Option("--for", help="Prune only what this engine runs: vllm or llama.cpp.")] = (
        None
    )
    tensor_parallel: Annotated[
        int, typer.Option(help="Keep heads and channels divisible by this many processes of vLLM.", min=1)
    ] = 1

    @property
    def engine(self) -> Engine | None:
        """The engine; None if there is no restriction.

        Raises:
            InputError: an unknown one.
        """
        if self.for_ is None:
            return "vllm" if self.tensor_parallel > 1 else None
        return read_engine(self.for_)

    def settings(self, decoder: Decoder, method: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Return a method's settings, restricted to what the engine runs."""
        return settings_for(self.engine, decoder, method, settings, self.tensor_parallel)


_SEARCH = "auto"
"""The method that compares plans, and so can have a gate."""
_AMOUNTS = {
    "remove": "remove",
    "target_params": "target_params",
    "target_memory": "target_memory",
    "context": "context",
    "target_speedup": "target_speedup",
    "blocks": "blocks",
    "slicing": "slice_",
}
"""Fields of an amount, and the options they come from."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the result goes, and how it is shown."""

    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write. (default: under secateur-runs/)")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would need, and stop.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document for programs.")] = False


@dataclass(frozen=True, kw_only=True)
class Saving(Output):
    """Where a checkpoint goes, and whether it is verified."""

    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Reopen the result in a fresh process; after a cut, compare it on text."
        ),
    ] = True


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Which requests are timed, and how often."""

    batch_sizes: Annotated[str, typer.Option(help="Sequences at a time: 1,8.")] = ",".join(map(str, BATCHES))
    prompts: Annotated[
        str | None, typer.Option(help="Tokens of a prompt: 128,512. (default: these, as far as positions allow)")
    ] = None
    new_tokens: Annotated[int, typer.Option(help="Tokens written after the prompt.")] = NEW_TOKENS
    repeats: Annotated[int, typer.Option(help="Rounds that are measured.")] = 5
    warmup: Annotated[int, typer.Option(help="Warm-up rounds before them.")] = 1
    draft_tokens: Annotated[int, typer.Option(help="With --as-draft-of: tokens drafted before each check.")] = 5

    def timing(self) -> Timing:
        """Return the requests and rounds.

        Raises:
            InputError: a number out of range.
        """
        return Timing(
            batch_sizes=tuple(whole_numbers(self.batch_sizes, "--batch-sizes")),
            prompts=None if self.prompts is None else tuple(whole_numbers(self.prompts, "--prompts")),
            new_tokens=self.new_tokens,
            repeats=self.repeats,
            warmup=self.warmup,
            draft_tokens=self.draft_tokens,
        )


def read_windows(text: str, option: str) -> Count:
    """Read a number of windows; None for `all`.

    Raises:
        InputError: neither a number nor `all` nor `auto`.
    """
    if text == "all":
        return None
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option} {text}: give a number from 1 up, 'auto' or 'all'.")
    return int(text)


def whole_numbers(text: str, option: str) -> list[int]:
    """Read whole numbers such as `1,8`.

    Raises:
        InputError: not whole numbers from 1 up.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option} {text}: write whole numbers from 1 up, such as 1,8.")
    return [int(part) for part in parts]


def read_pairs(typed: list[str] | None) -> dict[str, Any]:
    """Read `key=value` pairs.

    Raises:
        InputError: a pair without `=`.
    """
    pairs = [text.partition("=") for text in typed or []]
    for name, equals, _ in pairs:
        if not equals or not name:
            raise InputError(f"--set {name}: write it as key=value, such as --set protect_last=2.")
    return {name.strip(): value.strip() for name, _, value in pairs}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Show Typer the fields of each option group among a command's parameters, and pass the groups to the command."""
    hints = get_type_hints(command, include_extras=True)
    own = inspect.signature(command).parameters
    groups = {name: hints[name] for name in own if is_dataclass(hints[name])}
    plain = [one.replace(annotation=hints[name]) for name, one in own.items() if name not in groups]
    shared = [parameter for group in groups.values() for parameter in _options(group)]

    @functools.wraps(command)
    def packing(**given: Any) -> None:
        packed = {
            name: group(**{option.name: given.pop(option.name) for option in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **packed)

    ordered = [*plain, *shared]
    call: Any = packing
    call.__signature__ = inspect.Signature([one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in ordered])
    call.__annotations__ = {one.name: one.annotation for one in ordered}
    del call.__wrapped__  # otherwise Typer would inspect the wrapped command
    shown: Callable[..., None] = call
    return shown


def _options(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if option.default is MISSING else option.default,
            annotation=hints[option.name],
        )
        for option in fields(group)
    ]

"""Methods that remove whole blocks; they differ in which.

* ShortGPT: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect".
* UIDL, last-n: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers".
* Shortened-LLaMA: Kim et al. 2024, "Shortened LLaMA: Depth Pruning for Large Language Models".
* SLEB: Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer
  Blocks".

Each yields candidates: the blocks to remove for 1, 2, 3, … blocks. The budget picks one of them. Scores are taken
before the final norm (released code often takes the last one after it), and ties go to the lower block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field

from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.methods.asked import Asked
from secateur.methods.budget import Budget, choose_blocks
from secateur.methods.greedy import ComparingSettings, GreedySettings, greedily
from secateur.methods.method import Measurements, Settings, applies, method
from secateur.models.decoder import Decoder
from secateur.plan.steps import DropBlocks
from secateur.plan.work import Work
from secateur.scores.measure import score_model
from secateur.scores.taylor import taylor
from secateur.surgery.depth.blocks import can_go, keep_blocks, require_one_basis, require_removable

Candidates = Iterator[tuple[int, ...]]
Candidate = TypeVar("Candidate", bound=Callable[[Measurements, Any, Budget], Candidates])


class WindowSettings(Settings):
    """Settings of methods that remove neighbouring blocks."""

    window: int | None = Field(None, ge=0, description="number of neighbouring blocks to remove (the papers' n)")

    def own_amount(self) -> Budget | None:
        """Return the papers' n."""
        return None if self.window is None else Budget("blocks", self.window, knob="window")


class LastSettings(Settings):
    """Settings of `last-n`; the paper keeps the very last block."""

    protect_last: int = Field(1, ge=0, description="number of blocks at the end that never change")


class ShortenedSettings(ComparingSettings):
    """Settings of `shortened-llama`."""

    criterion: Literal["ppl", "taylor", "magnitude"] = Field("ppl", description="score that ranks the blocks")
    per_window: bool = Field(
        False, description="taylor: take absolute values window by window, so that signed products cannot cancel"
    )
    protect_first: int | None = Field(  # type: ignore[assignment]
        None, ge=0, description="blocks at the start that never change; the paper's 4 for taylor and magnitude, else 0"
    )
    protect_last: int | None = Field(  # type: ignore[assignment]
        None, ge=0, description="blocks at the end that never change; the paper's 2 for taylor and magnitude, else 0"
    )

    def free_blocks(self, count: int) -> range:
        """Return the removable blocks, of `count`."""
        paper = (0, 0) if self.criterion == "ppl" else (4, 2)
        first = paper[0] if self.protect_first is None else self.protect_first
        last = paper[1] if self.protect_last is None else self.protect_last
        return range(first, max(first, count - last))


class SlebSettings(GreedySettings):
    """Settings of `sleb`; the paper keeps the first and the last block."""

    protect_first: int = Field(1, ge=0, description="number of blocks at the start that never change")
    protect_last: int = Field(1, ge=0, description="number of blocks at the end that never change")


def _decide(
    name: str, candidates: Callable[[Measurements, Any, Budget], Candidates]
) -> Callable[..., Sequence[DropBlocks]]:
    """Create the deciding function of a method from its candidates."""

    def decide(measurements: Measurements, settings: Any, budget: Budget) -> Sequence[DropBlocks]:
        decoder = measurements.decoder
        if not budget.is_zero:
            require_one_basis(decoder)
        free = settings.free_blocks(decoder.block_count)
        most = min(len(free), decoder.block_count - 1)
        if most < 1 and not budget.is_zero:
            raise InputError(
                f"{name}: all {decoder.block_count} blocks are protected; lower protect_first or protect_last."
            )
        blocks: tuple[int, ...] = ()
        if not budget.is_zero:
            if not any(can_go(decoder, (block,)) for block in free):
                require_removable(decoder, free)
            found = (one for one in candidates(measurements, settings, budget) if len(one) <= most)
            blocks = choose_blocks(budget, found, decoder.block_parameter_counts(), decoder.parameter_count, most)
        return (DropBlocks(method=name, settings=settings.model_dump(exclude_none=True), blocks=blocks),)

    return decide


def drop_method(*, name: str, **row: Any) -> Callable[[Candidate], Candidate]:
    """Register a method whose candidates the decorated function yields; the one that meets the budget is removed.

    Args:
        name: name of the method.
        row: other fields of `Method`.
    """

    def register(candidates: Candidate) -> Candidate:
        method(order=10, name=name, **row)(_decide(name, candidates))
        return candidates

    return register


_UIDL = "Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers"


@drop_method(
    name="shortgpt",
    summary="remove the blocks that change the hidden states least (block influence)",
    paper="Men et al. 2024, ShortGPT",
    settings=Settings,
)
def by_block_influence(measurements: Measurements, settings: Settings, _budget: Budget) -> Candidates:
    """Rank by BI(l) = 1 − E cos(X^l, X^{l+1}), smallest first."""
    influence = measurements.block_influence()
    return _lowest_first(measurements.decoder, influence, settings.free_blocks(len(influence)))


@drop_method(
    name="uidl",
    summary="remove the window of blocks with the smallest angular distance at the last token",
    paper=_UIDL,
    settings=WindowSettings,
)
def by_angle(measurements: Measurements, settings: WindowSettings, _budget: Budget) -> Candidates:
    """For each length choose the window with the smallest angular distance A(l, n)."""
    scores = measurements.scores("angular")
    free = settings.free_blocks(measurements.decoder.block_count)
    for length in range(1, len(free) + 1):
        angles = scores.window_angle(length)
        starts = [start for start in _starts(free, length) if can_go(measurements.decoder, _window(start, length))]
        if starts:
            yield _window(min(starts, key=lambda start: angles[start]), length)


@drop_method(
    name="last-n",
    summary="remove the deepest blocks except the last; needs no texts",
    paper=_UIDL + " (its simple strategy)",
    settings=LastSettings,
    needs_texts=lambda _: False,
    forwards=lambda _asked, _settings, _windows: 0.0,
)
def deepest(measurements: Measurements, settings: Settings, _budget: Budget) -> Candidates:
    """Remove the last blocks that are not protected."""
    decoder = measurements.decoder
    gone: tuple[int, ...] = ()
    for block in reversed(settings.free_blocks(decoder.block_count)):
        if can_go(decoder, (block, *gone)):
            gone = (block, *gone)
            yield gone


def _shortened_forwards(asked: Asked, settings: ShortenedSettings, windows: Windows) -> Work:
    blocks = asked.blocks
    without_each, back_and_forth = Work((blocks + 1) / 2, losses=blocks + 1), Work(4.0, losses=3.0)
    ranked = {"ppl": without_each.on_share(settings.share(windows)), "taylor": back_and_forth, "magnitude": Work()}
    return ranked[settings.criterion]


def _removal_perplexity(measurements: Measurements, settings: ShortenedSettings) -> tuple[float, ...] | None:
    """Return the perplexity without each block: as given, or measured on the tokens that are to tell them apart."""
    known, windows = measurements.known, settings.compared_on(measurements.need_windows())
    if known is not None and known.has(("perplexity",)):
        return known.removal_perplexity
    key = ("perplexity without each block", windows.fingerprint)
    if key not in measurements.cache:
        found = score_model(measurements.decoder, windows, ("perplexity",), options=measurements.options)
        measurements.cache[key] = found.removal_perplexity
    return measurements.cache[key]


@drop_method(
    name="shortened-llama",
    summary="remove the blocks of lowest removal perplexity, Taylor or magnitude, in one shot",
    paper="Kim et al. 2024, Shortened LLaMA",
    settings=ShortenedSettings,
    needs_texts=lambda settings: settings.criterion != "magnitude",
    forwards=_shortened_forwards,
    scores=lambda settings: ("taylor",) if settings.criterion == "taylor" else (),
)
def by_shortened_criterion(measurements: Measurements, settings: ShortenedSettings, _budget: Budget) -> Candidates:
    """Rank by removal perplexity, Taylor or magnitude, smallest first, in one shot."""
    if settings.criterion == "ppl":
        values = _removal_perplexity(measurements, settings)
    elif settings.criterion == "taylor" and settings.per_window:
        windows = measurements.need_windows()
        values = tuple(taylor(measurements.decoder, windows, per_window=True, options=measurements.options))
    elif settings.criterion == "taylor":
        values = measurements.scores("taylor").taylor
    else:
        values = measurements.scores("magnitude").magnitude
    assert values is not None
    return _lowest_first(measurements.decoder, values, settings.free_blocks(len(values)))


@drop_method(
    name="sleb",
    summary="greedily remove the block whose absence costs the least loss, one after the other",
    paper="Song et al. 2024, SLEB",
    settings=SlebSettings,
    forwards=lambda asked, settings, windows: settings.work(asked.blocks - 2, asked.gone, windows),
)
def by_absence(measurements: Measurements, settings: SlebSettings, _budget: Budget) -> Candidates:
    """Repeatedly skip the block whose absence costs least, on the model without those already skipped."""
    decoder = measurements.decoder
    free = settings.free_blocks(decoder.block_count)
    series = greedily(
        measurements,
        free,
        windows=settings.compared_on(measurements.need_windows()),
        again=settings.again,
        name="block",
        allowed=lambda gone: can_go(decoder, gone),
    )
    return (tuple(sorted(gone)) for gone, _ in series)


def _lowest_first(decoder: Decoder, values: Sequence[float], free: range) -> Candidates:
    gone: tuple[int, ...] = ()
    for block in sorted(free, key=lambda block: (values[block], block)):
        if can_go(decoder, (*gone, block)):
            gone = (*gone, block)
            yield tuple(sorted(gone))


def _starts(free: range, length: int) -> range:
    return range(free.start, free.stop - length + 1)


def _window(start: int, length: int) -> tuple[int, ...]:
    return tuple(range(start, start + length))


@applies(DropBlocks)
def apply(measurements: Measurements, step: DropBlocks) -> Decoder:
    """Remove the step's blocks."""
    return keep_blocks(measurements.decoder, step.kept_blocks(measurements.decoder.block_count))

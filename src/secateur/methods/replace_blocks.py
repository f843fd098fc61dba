"""LLM-Streamline: a window of neighbouring blocks is replaced by one light network that is trained for it.

Chen et al. 2024, "Streamlining Redundant Layers to Compress Large Language Models" (arXiv:2403.19135). The window is
the one with the largest mean cosine C(l, n+1) between its input and its output; its n+1 blocks become one network, so n
blocks are removed net. Departures from the paper and its code: cosines and targets are taken before the final norm even
if the window ends with the last block; the network of lowest validation loss is the one kept; the learning rate falls
along one cosine; with `network=none` the window of n blocks is simply removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn
from torch.utils.data import Dataset

from secateur.data.texts import windows_for, without_own
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.methods.asked import Asked
from secateur.methods.budget import Budget, choose_blocks, choose_size, sizes_of
from secateur.methods.drop_blocks import WindowSettings
from secateur.methods.method import Applied, Measurements, applies, method
from secateur.modeling import SecateurConfig
from secateur.modeling.modeling_secateur import SecateurDecoderLayer
from secateur.models.decoder import Decoder
from secateur.models.forward import Call
from secateur.plan.amount import read_count
from secateur.plan.replace import training_forwards
from secateur.plan.steps import DropBlocks, Loss, Pairs, ReplaceBlocks, Span
from secateur.scores.profile import Scores
from secateur.surgery.assembly import Tensors
from secateur.surgery.depth.blocks import can_go, keep_blocks, require_one_basis, with_block_tensors
from secateur.surgery.depth.replacement import network_config, new_network, with_network
from secateur.surgery.hidden.folding import stream_sizes
from secateur.training.data import LanguageModelling, WindowData, split_off_validation
from secateur.training.pairs import BlockNetwork, PairData, PairRegression, store_pairs
from secateur.training.settings import TrainingSettings, warn_of
from secateur.training.trainer import TrainingRun, train
from secateur.training.weights import in_float32


class StreamlineSettings(WindowSettings, TrainingSettings):
    """Settings of `streamline`: the window, its replacement, and how that is trained."""

    network: Literal["block", "ffn", "swiglu", "none"] = Field(
        "block", description="what replaces the window: block (the result stays stock), ffn, swiglu, or none"
    )
    network_blocks: int = Field(1, ge=1, le=2, description="number of blocks that replace the window (network=block)")
    inner: int | None = Field(None, ge=1, description="channels of ffn and swiglu; by default those of the blocks' MLP")
    loss: Loss = Field(
        "mse", description="mse on hidden states, the language-modelling loss (in memory only), or one after the other"
    )
    train_texts: str | None = Field(None, description="texts to train the network on; by default the calibration texts")
    train_tokens: int = Field(1_000_000, ge=1, description="number of training tokens, such as 2M (the paper's: 61M)")
    pairs: Pairs | None = Field(
        None, description="hidden states recomputed or kept on disk in bfloat16; by default on disk for skeletons"
    )

    @field_validator("train_tokens", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return int(read_count(value, "train_tokens")) if isinstance(value, str) else value

    @property
    def stays(self) -> int:
        """Number of blocks that are left of the window."""
        return {"none": 0, "block": self.network_blocks}.get(self.network, 1)

    @model_validator(mode="after")
    def _two_are_blocks(self) -> StreamlineSettings:
        if self.network != "block" and self.network_blocks != 1:
            raise ValueError(f"network={self.network} is one module; network_blocks belongs to network=block")
        return self

    def training(self) -> TrainingSettings:
        """Return those that the training loop takes."""
        return TrainingSettings(**{name: getattr(self, name) for name in TrainingSettings.model_fields})


def _apply_forwards(_asked: Asked, settings: StreamlineSettings, tokens: int) -> float:
    return 0.0 if settings.network == "none" else training_forwards(settings.loss, settings.train_tokens, tokens)


@method(
    order=20,
    name="streamline",
    summary="remove the window that changes the hidden states least, and train a light network in its place",
    paper="Chen et al. 2024, LLM-Streamline",
    settings=StreamlineSettings,
    apply_forwards=_apply_forwards,
)
def decide(
    measurements: Measurements, settings: StreamlineSettings, budget: Budget
) -> Sequence[DropBlocks | ReplaceBlocks]:
    """Choose the window.

    Raises:
        InputError: too few blocks are free, or the budget is out of reach.
        ModelError: the model cannot hold such a network.
    """
    if budget.is_zero:
        return ()
    decoder = measurements.decoder
    require_one_basis(decoder)
    free = settings.free_blocks(decoder.block_count)
    extra = settings.stays
    most = min(len(free), decoder.block_count - 1 + extra) - extra
    if most < 1:
        held = "all" if not free else f"all but {len(free)} of"
        raise InputError(
            f"streamline: {held} {decoder.block_count} blocks are protected; lower protect_first or protect_last."
        )
    cosines = measurements.scores("cosine")

    def window(gone: int) -> Span:
        length = gone + extra
        found = cosines.window_cosine(length)
        everywhere = range(free.start, free.stop - length + 1)
        starts = [one for one in everywhere if can_go(decoder, range(one + extra, one + length))]
        start = max(starts or everywhere, key=lambda one: found[one])
        return start, start + length - 1

    total, sizes = decoder.parameter_count, decoder.block_parameter_counts()
    if settings.network in ("none", "block"):
        candidates = (tuple(range(low + extra, high + 1)) for low, high in map(window, range(1, most + 1)))
        gone = choose_blocks(budget, candidates, sizes, total, most)
        if settings.network == "none":
            return (DropBlocks(method="streamline", settings=settings.model_dump(exclude_none=True), blocks=gone),)
        return (_step(decoder, settings, window(len(gone)), cosines),)
    steps = [_step(decoder, settings, window(gone), cosines) for gone in range(1, most + 1)]
    if budget.aim == "blocks":
        if budget.value > most:
            raise InputError(
                f"blocks={int(budget.value)}: at most {most} blocks can be removed, with one network in their place."
            )
        return (steps[int(budget.value) - 1],)
    dense = sizes_of(decoder)
    after = [step.sizes_after(dense) for step in steps]
    kept = [step.kept_blocks(decoder.block_count) for step in steps]
    units = [one.units for one in after]
    return (steps[choose_size(budget, [one.total for one in after], total, kept, units)],)


def _step(decoder: Decoder, settings: StreamlineSettings, window: Span, scores: Scores) -> ReplaceBlocks:
    low, high = window
    assert settings.network != "none"
    mlp: dict[str, Any] = {}
    if settings.network != "block":
        config = network_config(decoder, window, settings.network, settings.inner)
        mlp = {"inner": config.intermediate_sizes[low], "sizes": stream_sizes(config)}  # type: ignore[index]
    return ReplaceBlocks(
        method="streamline",
        settings=settings.model_dump(exclude_none=True),
        window=window,
        network=settings.network,
        network_blocks=settings.network_blocks,
        train_tokens=settings.train_tokens,
        loss=settings.loss,
        pairs=settings.pairs,
        cosine=scores.window_cosine(high - low + 1)[low],
        **mlp,
    )


class _MlpNetwork(nn.Module):
    """An MLP with its norm and its residual."""

    def __init__(self, block: SecateurDecoderLayer) -> None:
        super().__init__()
        self.block = block

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.block]

    def forward(self, hidden: torch.Tensor, _calls: Sequence[Call]) -> torch.Tensor:
        return hidden + self.block.mlp_branch(hidden)


class _Training:
    """Creates the network of one step, trains it, and inserts it."""

    def __init__(self, measurements: Measurements, step: ReplaceBlocks) -> None:
        self.measurements, self.step, self.decoder = measurements, step, measurements.decoder
        self.facts: dict[str, Any] = {}
        self.settings = StreamlineSettings.model_validate(step.settings)
        self.low, self.high = step.window
        self.config: SecateurConfig | None = None
        if step.network != "block":
            self.config = network_config(self.decoder, step.window, step.network, step.inner)
            if stream_sizes(self.config) != step.sizes:
                raise InputError("this step was made for a model of another shape; make a new plan for this one.")
        if "lm" in self.step.loss and self.decoder.is_skeleton:
            raise InputError(
                f"loss={self.step.loss}: the language-modelling loss needs the whole model in memory; open it "
                "with --in-memory, or take loss=mse."
            )
        self.windows = training_windows(measurements, self.settings, step.train_tokens)
        self.numbers, self.held_back = split_off_validation(self.windows)

    def result(self) -> Decoder:
        """Train as the step says; return the model with the network in it."""
        network = self._new_network()
        if "mse" in self.step.loss:
            self._on_pairs(network)
        tensors = [_tensors(block) for block in network.blocks]
        if "lm" in self.step.loss:
            tensors = self._on_language(tensors)
        return self._put_in(tensors)

    def _new_network(self) -> BlockNetwork | _MlpNetwork:
        if self.config is not None:
            return _MlpNetwork(new_network(self.config, self.low, self.decoder.device, self.measurements.options.seed))
        return BlockNetwork.copy_of(self.decoder, self._places)

    @property
    def _places(self) -> range:
        """Blocks that the network takes the place of."""
        return range(self.low, self.low + self.step.network_blocks)

    def _on_pairs(self, network: nn.Module) -> None:
        """Train the network alone, on the input and output of the window."""
        network.requires_grad_(True)
        objective = PairRegression(self.decoder, self.step.window, network, folded=self.config is not None)
        data, held_out = self._items(self.numbers), self._items(self.held_back)
        if self.step.stores_pairs(skeleton=self.decoder.is_skeleton):
            pairs = store_pairs(self.decoder, self.windows, self.step.window, options=self.measurements.options)
            data, held_out = PairData(data, pairs, self.numbers), PairData(held_out, pairs, self.held_back)
        with self.decoder.outer(head=False):
            self._train("mse", objective, data, held_out)

    def _on_language(self, tensors: list[Tensors]) -> list[Tensors]:
        """Train the network in its place, everything else frozen, on the language-modelling loss."""
        model = self._put_in(tensors)
        blocks = [model.block_list[place].float().requires_grad_(True) for place in self._places]
        if not self.settings.training().evens_out(self.decoder.device):
            in_float32(model.module)
        if model.module.supports_gradient_checkpointing:
            model.module.gradient_checkpointing_enable({"use_reentrant": False})
        self._train("lm", LanguageModelling(model.module), self._items(self.numbers), self._items(self.held_back))
        return [_tensors(block) for block in blocks]

    def _items(self, numbers: range) -> Dataset[dict[str, torch.Tensor]]:
        return WindowData(self.windows, numbers)

    def _train(self, loss: str, objective: nn.Module, data: Any, held_out: Any) -> None:
        """Run the training loop, in a folder of its own if the caller keeps states."""
        recipe = {
            "model": self.decoder.fingerprint,
            "step": self.step.model_dump(mode="json"),
            "loss": loss,
            "texts": self.windows.fingerprint,
        }
        outcome = train(
            objective,
            data,
            held_out,
            self.settings.training(),
            TrainingRun(recipe=recipe, what=f"training the replacement of blocks {self.low} to {self.high}"),
            device=self.decoder.device,
            options=self.measurements.options.within(f"{self.decoder.fingerprint[:12]}-{loss}"),
        )
        self.facts[f"training ({loss})"] = outcome.describe()
        warn_of(outcome.describe(), f"training the replacement of blocks {self.low} to {self.high} ({loss})")

    def _put_in(self, tensors: list[Tensors]) -> Decoder:
        """Return the model with the network in place of the window, its weights rounded to the dtype to be saved."""
        sums = [[n, float(t.double().sum()), float(t.double().norm())] for one in tensors for n, t in one.items()]
        edit = {"replace": [self.low, self.high, self.step.network], "weights": sums}
        if self.config is not None:
            return with_network(self.decoder, self.config, self.step.window, tensors[0], edit)
        dtype = self.decoder.module.dtype
        stored = [{n: t.to(self.decoder.saved_dtype).to(dtype) for n, t in one.items()} for one in tensors]
        shorter = keep_blocks(self.decoder, self.step.kept_blocks(self.decoder.block_count))
        return with_block_tensors(shorter, zip(self._places, stored, strict=True), edit)


def training_windows(measurements: Measurements, settings: StreamlineSettings, tokens: int) -> Windows:
    """Open the texts a network is trained on: the given ones, else more from the source of the calibration texts.

    Windows that were given as tokens cannot be extended and are used as they are.

    Raises:
        InputError: the texts cannot be opened, or there is too little text.
    """
    calibration = measurements.need_windows()
    if settings.train_texts is None and calibration.given:
        return calibration
    return windows_for(
        measurements.decoder,
        settings.train_texts or without_own(calibration),
        windows=max(2, tokens // calibration.seq_len),
        seq_len=calibration.seq_len,
        options=measurements.options,
    )


def _tensors(block: nn.Module) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in block.named_parameters()}


@applies(ReplaceBlocks)
def apply(measurements: Measurements, step: ReplaceBlocks) -> Applied:
    """Train the network that replaces the step's window, and insert it.

    Raises:
        InputError: the step is for another model, there is too little text, or the model is not whole in memory.
        NumericsError: the loss became NaN before any improvement.
    """
    step.kept_blocks(measurements.decoder.block_count)
    training = _Training(measurements, step)
    return Applied(training.result(), training.facts)

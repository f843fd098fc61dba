"""An open decoder: the module, its tokenizer and anatomy, and how the weights of single blocks are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.modeling import SecateurConfig
from secateur.models.anatomy import Anatomy, count_parameters, find, text_config
from secateur.models.quantised import Quantisation
from secateur.models.shards import OUTER, Shards


@dataclass
class Decoder:
    """A causal language model opened for pruning.

    Attributes:
        module: the transformers model; for a skeleton its parameters are on the meta device.
        tokenizer: None where the checkpoint has none.
        anatomy: where its parts are.
        source: what the user named: a path or a hub name.
        folder: the local checkpoint folder, None for a model given as an object.
        fingerprint: sha256 that identifies this model.
        saved_dtype: the checkpoint's dtype, kept when the model is saved.
        shards: where a skeleton reads its weights; None for a model in memory.
        shapes_only: whether it is a skeleton only for estimating a job that will hold all weights in memory.
        for_estimate: whether it was opened only to estimate a job (`open_shapes`).
        other_tokenizer: whether the tokenizer is not the checkpoint's.
        history: one entry per plan or healing applied so far, oldest first (saved in `secateur.json`).
        gguf: the GGUF file it was dequantised from; None for any other checkpoint.
        quantised: how the weights of its folder are quantised, which are dequantised when they are read.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    anatomy: Anatomy
    source: str
    folder: Path | None
    fingerprint: str
    saved_dtype: torch.dtype
    shards: Shards | None = None
    shapes_only: bool = False
    for_estimate: bool = False
    other_tokenizer: bool = False
    history: tuple[dict[str, Any], ...] = field(default=())
    gguf: Path | None = None
    quantised: Quantisation | None = None
    _held: dict[int, tuple[str, ...]] = field(default_factory=dict, init=False, repr=False)

    @property
    def config(self) -> Any:
        """The transformers configuration of the decoder; in a multimodal wrapper, that of its text decoder."""
        return text_config(self.module.config)

    @property
    def is_wrapped(self) -> bool:
        """Whether it is the text decoder of a multimodal model."""
        return self.config is not self.module.config

    @property
    def block_count(self) -> int:
        """Number of blocks, L."""
        return self.anatomy.block_count

    @property
    def has_own_code(self) -> bool:
        """Whether opening a saved copy runs code next to the weights: secateur's, or code trusted before."""
        return isinstance(self.config, SecateurConfig) or type(self.module).__module__.startswith(
            "transformers_modules"
        )

    @property
    def is_skeleton(self) -> bool:
        """Whether block weights are read on demand instead of being held in memory."""
        return self.shards is not None

    @property
    def by_blocks(self) -> bool:
        """Whether a job on this model holds a few blocks at a time, not all."""
        return self.is_skeleton and not self.shapes_only

    @property
    def device(self) -> torch.device:
        """Device of the inputs, which is that of the embeddings."""
        if self.shards is None:
            return next(iter(self.module.get_input_embeddings().parameters())).device
        return self.shards.device

    @property
    def max_positions(self) -> int | None:
        """Longest window the model's positions allow; None if the configuration sets no limit."""
        value = getattr(self.config, "max_position_embeddings", None)
        return int(value) if value else None

    @property
    def hidden_size(self) -> int:
        """Width d of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def state_size(self) -> int:
        """Numbers that a block passes on for a token: the hidden size, times the number of residual streams."""
        return self.hidden_size * self.anatomy.family.streams

    @property
    def changes_basis(self) -> bool:
        """Whether shortcut matrices rotate the residual stream, so that blocks fit only their neighbours."""
        return any(getattr(self.config, "shortcuts", None) or ())

    @property
    def block_list(self) -> nn.ModuleList:
        """The list of blocks; in a skeleton their weights are absent outside of `block`."""
        blocks: nn.ModuleList = find(self.module, self.anatomy.family.blocks)
        return blocks

    @property
    def parameter_count(self) -> int:
        """Number of parameters, tied tensors counted once."""
        return count_parameters(self.module)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the weights on disk: all parameters in the dtype they are saved in, tied ones once."""
        return self.parameter_count * self.saved_dtype.itemsize

    def block_parameter_counts(self) -> tuple[int, ...]:
        """Number of parameters that go with each block.

        What several blocks share belongs to none, as it stays without one; of what is packed block by block outside
        the blocks, each owns its part.
        """
        own = [{id(one): one.numel() for one in block.parameters()} for block in self.block_list]
        holders = Counter(one for block in own for one in block)
        packed = self.packed_parameters // self.block_count
        return tuple(packed + sum(size for one, size in block.items() if holders[one] == 1) for block in own)

    @property
    def packed_parameters(self) -> int:
        """Number of parameters outside the blocks that hold a part for each block."""
        return sum(find(self.module, name).numel() for name, _ in self.anatomy.family.packed)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Yield block `index` with its weights; a skeleton reads them now and frees them at the end."""
        with self._present(index):
            yield self.block_list[index]

    @contextmanager
    def outer(self, *, table: bool = True, head: bool = True) -> Iterator[None]:
        """Hold embeddings, final norm and head in memory; the token table or the head can be left out if untied."""
        family = self.anatomy.family
        choice = {} if self.anatomy.tied else {family.embeddings[0]: table, family.head: head}
        with self._present(OUTER, tuple(path for path, wanted in choice.items() if not wanted)):
            yield

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """Yield the module with all its weights; a skeleton reads them now and frees them at the end."""
        with ExitStack() as parts, self.outer():
            for index in range(self.block_count):
                parts.enter_context(self.block(index))
            yield self.module

    @contextmanager
    def _present(self, index: int, without: tuple[str, ...] = ()) -> Iterator[None]:
        if self.shards is None or index in self._held:
            assert set(self._held.get(index, ())) <= set(without), "opened without a part that is wanted now"
            yield
            return
        self.shards.load(self.module, index, without)
        self._held[index] = without
        if index != OUTER:
            self.shards.read_ahead(index + 1)
        try:
            yield
        finally:
            del self._held[index]
            self.shards.release(self.module, index)

"""Text that a model writes itself: calibration without any data, from the model's own distribution.

Self-generated text follows the model's own distribution: Williams, Chrysostomou and Aletras 2024, Self-calibration for
Language Model Quantization and Pruning (arXiv 2410.17170), from single tokens; Wang et al. 2025, Think Before You Prune
(RESP, arXiv 2512.02185), from prompts. Here half of the windows start with one random token, half with the chat
template, if there is one, and after an end of text the next one starts; sampled from the whole distribution at
temperature 1.

Shapes: R windows written in parallel, T tokens each, V entries of the vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from secateur.data.templates import ChatRenderer
from secateur.distributed import from_main_process, is_main_process
from secateur.errors import InputError, NumericsError
from secateur.files import cache_folder
from secateur.models.decoder import Decoder
from secateur.ownership import owned_name, remove_litter
from secateur.progress import SILENT, Progress
from secateur.versions import digest

AT_A_TIME = 32
FEWEST_KINDS = 5
"""A window with fewer distinct tokens says nothing."""

PROMPTS = (
    "",
    "Hello!",
    "Explain something you know well.",
    "Write a short story.",
    "Give me an example, step by step.",
    "Write a short program.",
    "Write an article for an encyclopedia.",
    "Write the biography of a person.",
    "Tell me about the history of a place.",
    "Write a news report.",
    "Explain how something works, in detail.",
    "Write a review.",
    "Write an essay about a topic of your choice.",
    "Describe an animal or a plant.",
    "Write a letter.",
    "Summarise a book or a film.",
)
"""What the user says if the chat template needs a user: kinds of text rather than subjects.

Asked for little more than to say something, a model writes like an assistant, and what is repaired on that is worse on
articles.
"""

_LONGEST_BEGINNING = 65_536
"""Characters that a chat template may write around a short question; system prompts have a tenth of that."""

_VERSION = 2  # of the generation: part of the name under which its text is cached


@dataclass(frozen=True)
class OwnText:
    """A model as a source of text.

    Attributes:
        model: the open model that writes.
        progress: reports progress.
    """

    model: Decoder
    progress: Progress = SILENT

    @property
    def label(self) -> str:
        """Name of the model in fingerprints of windows."""
        return self.model.fingerprint[:16] or self.model.source

    @property
    def notes(self) -> tuple[str, ...]:
        """What to tell the user."""
        if self.model.for_estimate:
            return ("the model's own text is not written yet: that takes time before the job",)
        if self.model.history:
            return ("written by the pruned model, with its damage; a file written by the dense one would be better",)
        return ()

    def windows(self, count: int, seq_len: int, *, seed: int, held_out: bool, bos: bool) -> torch.Tensor:
        """Return windows as `own_windows` does; for a model opened for an estimate, random tokens.

        Raises:
            InputError, NumericsError: as `own_windows`.
        """
        if self.model.for_estimate:
            known = self.model.module.get_input_embeddings().num_embeddings
            return torch.randint(0, known, (count, seq_len), generator=torch.Generator().manual_seed(seed))
        return own_windows(self.model, count, seq_len, seed=seed, held_out=held_out, bos=bos, progress=self.progress)


def own_windows(
    model: Decoder, count: int, seq_len: int, *, seed: int, held_out: bool, bos: bool, progress: Progress = SILENT
) -> torch.Tensor:
    """Let a model write windows; the same call on the same model returns them from the cache.

    Args:
        model: the open model; a skeleton is read into memory while it writes.
        count: number of windows R.
        seq_len: tokens in a window T, the beginning-of-sequence token included.
        seed: random seed.
        held_out: whether they are for evaluation: other windows than for calibration.
        bos: whether each window starts with the beginning-of-sequence token.
        progress: reports progress.

    Returns:
        int64 (R, T).

    Raises:
        InputError: the model has no tokenizer, or writes the same few tokens over and over.
        NumericsError: NaN in the logits.
    """
    kept = _kept(model, count, seq_len, seed, held_out, bos)
    found = _read(kept, (count, seq_len))
    if from_main_process(found is not None):
        return from_main_process(found)  # type: ignore[return-value]
    written = _written(model, count, seq_len, seed, held_out, bos, progress) if is_main_process() else None
    if written is not None and kept is not None:
        _keep(kept, written)
    return from_main_process(written)  # type: ignore[return-value]


def _written(
    model: Decoder, count: int, seq_len: int, seed: int, held_out: bool, bos: bool, progress: Progress
) -> torch.Tensor:
    if model.tokenizer is None:
        raise InputError(f"{model.source}: to write text of its own a model needs a tokenizer; give one (--tokenizer).")
    writer = _Writer(model, seed, held_out=held_out, bos=bos)
    batches = [range(first, min(first + AT_A_TIME, count)) for first in range(0, count, AT_A_TIME)]
    steps = iter(progress(range(len(batches) * seq_len), "the model's own text", len(batches) * seq_len))
    with model.whole() as module, torch.inference_mode():
        rows = [writer.write(module, numbers, seq_len, lambda: next(steps, None)) for numbers in batches]
    list(steps)
    poor = sum(kinds < FEWEST_KINDS for _, found in rows for kinds in found)
    if 2 * poor > count:
        raise InputError(
            f"{model.source}: degenerates when it writes: {poor} of {count} windows hold fewer than {FEWEST_KINDS} "
            "different tokens. Calibrate on other texts (--texts), or check the model."
        )
    return torch.cat([tokens for tokens, _ in rows])


class _Writer:
    """Beginnings of texts, and the loop that continues them."""

    def __init__(self, model: Decoder, seed: int, *, held_out: bool, bos: bool) -> None:
        tokenizer = model.tokenizer
        assert tokenizer is not None, "checked before"
        self._seed, self._device = (2 * seed + held_out) % (1 << 63), model.device
        known = min(len(tokenizer), model.module.get_input_embeddings().num_embeddings)
        special = set(tokenizer.all_special_ids)
        self._first = [token for token in range(known) if token not in special] or list(range(known))
        self._known = known
        self._bos = [tokenizer.bos_token_id] if bos else []
        self._ends = _end_tokens(model, tokenizer)
        self._chats = _chats(tokenizer, self._bos)

    def write(
        self, module: Any, numbers: range, length: int, tick: Callable[[], object]
    ) -> tuple[torch.Tensor, list[int]]:
        """Write the windows of these numbers; return tokens (R, T) and how many distinct ones were drawn in each."""
        draws = [np.random.default_rng((self._seed, number)) for number in numbers]
        ahead = [deque([*self._bos, *self._begin(n, draw)]) for n, draw in zip(numbers, draws, strict=True)]
        tokens_RT = torch.empty(len(numbers), length, dtype=torch.int64)
        drawn: list[set[int]] = [set() for _ in numbers]
        cache, logits_RV = None, None
        for position in range(length):
            sampled = [0] * len(numbers) if logits_RV is None else _sample(logits_RV[:, : self._known], draws)
            for row, number in enumerate(numbers):
                if ahead[row]:
                    tokens_RT[row, position] = ahead[row].popleft()
                    continue
                tokens_RT[row, position] = sampled[row]
                drawn[row].add(sampled[row])
                if sampled[row] in self._ends:
                    ahead[row].extend(self._begin(number, draws[row]))
            if position + 1 < length:
                fed = tokens_RT[:, position : position + 1].to(self._device)
                found = module(input_ids=fed, past_key_values=cache, use_cache=True)
                cache, logits_RV = found.past_key_values, found.logits[:, -1]
            tick()
        return tokens_RT, [len(kinds) for kinds in drawn]

    def _begin(self, number: int, draw: np.random.Generator) -> list[int]:
        """Begin a text: every second window with the chat template, the others with a random token."""
        if self._chats and number % 2:
            return self._chats[int(draw.integers(len(self._chats)))]
        return [self._first[int(draw.integers(len(self._first)))]]


def _sample(logits_RV: torch.Tensor, draws: list[np.random.Generator]) -> list[int]:
    """Draw one token per row at temperature 1, each row with its own random numbers."""
    if bool(torch.isnan(logits_RV).any()):
        raise NumericsError("NaN while the model writes; the weights may be damaged: try --dtype float32.")
    sums_RV = torch.softmax(logits_RV.float(), dim=-1).double().cumsum(dim=-1)
    aims_R1 = torch.tensor([[draw.random()] for draw in draws], dtype=torch.float64, device=sums_RV.device)
    found = torch.searchsorted(sums_RV, aims_R1 * sums_RV[:, -1:], right=True)
    chosen: list[int] = found.clamp(max=logits_RV.shape[1] - 1).flatten().tolist()
    return chosen


def _end_tokens(model: Decoder, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    settings = getattr(model.module, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _chats(tokenizer: PreTrainedTokenizerBase, bos: list[int]) -> list[list[int]]:
    """Return the beginnings of chats, up to where the assistant speaks; none without a template."""
    if tokenizer.chat_template is None:
        return []
    found, renderer = [], ChatRenderer(tokenizer)
    for prompt in PROMPTS:
        text = renderer.render([{"role": "user", "content": prompt}], asks=True)
        if len(text) > _LONGEST_BEGINNING:
            raise InputError(
                f"the chat template writes {len(text):,} characters before the model begins; give another tokenizer."
            )
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found.append(ids[1:] if bos and ids[:1] == bos else ids)
    return found


# The cache


def _kept(model: Decoder, count: int, seq_len: int, seed: int, held_out: bool, bos: bool) -> Path | None:
    """Return the file that holds these windows; None for a model that cannot be identified."""
    if not model.fingerprint:
        return None
    template = model.tokenizer.chat_template if model.tokenizer is not None else None
    name = digest(_VERSION, model.fingerprint, count, seq_len, seed, held_out, bos, template)
    return cache_folder("own-text") / f"{name}.npy"


def _read(kept: Path | None, shape: tuple[int, int]) -> torch.Tensor | None:
    if kept is None or not kept.is_file():
        return None
    try:
        found = np.array(np.load(kept, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None  # damaged: generated again
    return torch.from_numpy(found) if found.shape == shape and found.dtype == np.int64 else None


def _keep(kept: Path, tokens: torch.Tensor) -> None:
    temporary = kept.with_name(owned_name(f".{kept.name}", "tmp"))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        remove_litter(kept.parent, f".{kept.name}.")
        with temporary.open("wb") as file:
            np.save(file, tokens.numpy())
        temporary.replace(kept)
    except OSError as error:
        raise InputError(f"{kept.parent}: cannot be written ({error.strerror}); set SECATEUR_CACHE.") from error
    finally:
        temporary.unlink(missing_ok=True)

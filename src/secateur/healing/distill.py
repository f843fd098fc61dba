"""Distillation from the dense model: KL divergence of next-token distributions (Hinton et al. 2015).

The teacher runs next to the student, or its most likely tokens are written to disk first, so that only one model is in
memory at a time. When a distribution is truncated to k tokens, the remaining probability counts as one more token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from secateur.calibration.walk import last_states, parts_of
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.models.decoder import Decoder
from secateur.models.forward import logits
from secateur.run_options import DEFAULTS, RunOptions
from secateur.training.data import IGNORED, MappedTensors, WindowData, targets_of


class Distillation(nn.Module):
    """KL(teacher ‖ student) at a temperature, times its square, plus an optional hidden-state error."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        temperature: float = 1.0,
        hidden_weight: float = 0.0,
        kept: tuple[int, ...] = (),
    ) -> None:
        """Set up the objective.

        Args:
            student: the model that is trained.
            teacher: run on the same tokens; None if items hold its `top_scores` and `top_tokens`.
            temperature: divides the logits of both.
            hidden_weight: weight of the mean squared error between the inputs of each student block and of the same
                block of the teacher, relative to the latter's mean square.
            kept: for each student block its number in the teacher.
        """
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # in a tuple, so that its weights are no part of this module
        self.temperature, self.hidden_weight, self.kept = temperature, hidden_weight, kept

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        top_scores: torch.Tensor | None = None,
        top_tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum over predictions, and their number; labels of -100 are ignored."""
        given = {"input_ids": tokens, "use_cache": False, "output_hidden_states": self.hidden_weight > 0}
        if mask is not None:
            given["attention_mask"] = mask.long()
        output = self.student(**given)
        wanted = (targets_of(tokens, mask, labels) != IGNORED).flatten()
        student = _log_probabilities(output.logits, wanted, self.temperature)
        (teacher,) = self._teacher
        if teacher is None:
            assert top_scores is not None
            assert top_tokens is not None
            total = _cut_divergence(student, top_scores[:, :-1].flatten(0, 1)[wanted], top_tokens, wanted)
        else:
            with torch.no_grad():
                taught = teacher(**given)
            target = _log_probabilities(taught.logits, wanted, self.temperature)
            total = nn.functional.kl_div(student, target, reduction="sum", log_target=True)
        total = total * self.temperature**2
        if self.hidden_weight and teacher is not None:
            total = total + self.hidden_weight * wanted.sum() * self._hidden_errors(output, taught, mask)
        return total, wanted.sum()

    def _hidden_errors(self, output: Any, taught: Any, mask: torch.Tensor | None) -> torch.Tensor:
        errors = []
        for place, block in list(enumerate(self.kept))[1:]:  # the input of block 0 are the embeddings
            own, dense = output.hidden_states[place].float(), taught.hidden_states[block].float()
            if mask is not None:
                own, dense = own[mask], dense[mask]
            errors.append((own - dense).square().mean() / dense.square().mean())
        return torch.stack(errors).mean()


def _log_probabilities(scores: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    return (scores[:, :-1].flatten(0, 1)[wanted].float() / temperature).log_softmax(-1)


def _cut_divergence(
    student: torch.Tensor, top_scores: torch.Tensor, top_tokens: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Return the KL divergence over the teacher's top tokens and one token for all others."""
    known = top_scores.float().to(student.device)
    places = top_tokens[:, :-1].flatten(0, 1)[wanted].long().to(student.device)
    own = student.gather(-1, places)
    rest, own_rest = (_log_of_rest(one) for one in (known, own))
    return (known.exp() * (known - own)).sum() + (rest.exp() * (rest - own_rest)).sum()


def _log_of_rest(known: torch.Tensor) -> torch.Tensor:
    """Return log(1 − Σ exp), at least that of 1e-6."""
    return (1 - known.exp().sum(-1)).clamp_min(1e-6).log()


class TeacherScores(MappedTensors):
    """The teacher's k most likely tokens at every position.

    Attributes:
        scores: float16 (W, T, k), log-probabilities at the temperature.
        tokens: int32 (W, T, k).
    """

    @torch.no_grad()
    def __init__(
        self,
        teacher: Decoder,
        windows: Windows,
        *,
        top: int,
        temperature: float = 1.0,
        options: RunOptions = DEFAULTS,
    ) -> None:
        """Run the teacher over all windows; a skeleton holds one block at a time.

        Raises:
            OSError: there is no room for the files.
            NumericsError: NaN or infinity on the way.
        """
        shape = (len(windows), windows.seq_len, min(top, int(teacher.config.vocab_size)))
        super().__init__("teacher-scores", teacher_bytes(*shape))
        self.scores = self.tensor("scores", shape, torch.float16)
        self.tokens = self.tensor("tokens", shape, torch.int32)
        rows = 0
        for batch, hidden in last_states(teacher, windows, options):
            for some, part in parts_of(teacher, batch):
                found = logits(teacher, hidden[some], part.tokens, part.mask).float() / temperature
                best = found.log_softmax(-1).topk(shape[2], dim=-1)
                here = slice(rows, rows + len(part.tokens))
                self.scores[here] = best.values.half().cpu()
                self.tokens[here] = best.indices.int().cpu()
                rows = here.stop


def teacher_bytes(windows: int, seq_len: int, top: int) -> int:
    """Return the bytes on disk of the scores of so many tokens: a float16 and an int32 each."""
    return windows * seq_len * top * 6


class TaughtData(Dataset[dict[str, torch.Tensor]]):
    """Windows, each with the teacher's top tokens."""

    def __init__(self, items: WindowData, teacher: TeacherScores) -> None:
        """Join windows and scores."""
        self.items, self.teacher = items, teacher

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        number = self.items.numbers[item]
        return self.items[item] | {"top_scores": self.teacher.scores[number], "top_tokens": self.teacher.tokens[number]}


def require_same_vocabulary(student: Decoder, teacher: Decoder) -> None:
    """Refuse a teacher with another vocabulary.

    Raises:
        InputError: the number of tokens or the vocabulary differs.
    """
    sizes = [one.module.get_output_embeddings().weight.shape[0] for one in (student, teacher)]
    words = [one.tokenizer.get_vocab() if one.tokenizer is not None else None for one in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(f"the teacher {teacher.source} has {sizes[1]:,} tokens where the model has {sizes[0]:,}.")
    if None not in words and words[0] != words[1]:
        raise InputError(f"the teacher {teacher.source} has another vocabulary than the model; take the dense model.")

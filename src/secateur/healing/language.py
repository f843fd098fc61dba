"""The language-modelling loss as an objective."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

IGNORED = -100
"""Label of a position that is not learnt from."""


class LanguageModelling(nn.Module):
    """Next-token loss of a causal language model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Train what requires gradients in this model."""
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the sum of losses in nats and the number of predictions.

        Args:
            tokens: int64 (batch, positions).
            mask: bool, True at real tokens; None where nothing is padded.
            labels: what is to be predicted at each position, -100 where nothing is; None takes all real tokens.
        """
        given = {} if mask is None else {"attention_mask": mask.long()}
        scores = self.model(input_ids=tokens, use_cache=False, **given).logits
        return language_loss(scores, targets_of(tokens, mask, labels))


def targets_of(tokens: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor:
    """Give what each position but the last is to predict, (batch, positions - 1), -100 where nothing is."""
    targets = (tokens if labels is None else labels)[:, 1:]
    return targets if mask is None else targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED)


def language_loss(scores: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the loss of logits (batch, positions, vocabulary) against targets; gives it and the number of predictions."""
    flat = scores[:, :-1].float().flatten(0, 1)
    total = nn.functional.cross_entropy(flat, targets.flatten(), reduction="sum", ignore_index=IGNORED)
    return total, (targets != IGNORED).sum()

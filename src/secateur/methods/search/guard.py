"""What the search asks of a candidate besides a low loss: that it keeps what the dense model can do."""

from __future__ import annotations

from dataclasses import replace

from secateur.distributed import from_main_process
from secateur.evaluation.gate import Gate, accuracies_of
from secateur.models.decoder import Decoder
from secateur.run_options import RunOptions


class Guard:
    """A gate with the dense model's accuracies; every model is asked once, and only what the dense one can do.

    Attributes:
        dense: the dense model's accuracy of each probe.
    """

    def __init__(self, gate: Gate, dense: Decoder, questions: int, options: RunOptions) -> None:
        """Ask the dense model.

        Raises:
            InputError: it can do none of the probes, or it has no tokenizer.
        """
        self._gate, self._questions = gate, questions
        self._options = replace(options, batch_size=None)  # that of windows
        self._found: dict[str, str | None] = {}
        self.dense = self._ask(dense)
        gate.require(self.dense)
        self._gate = Gate(gate.able(self.dense), gate.kept)

    def failing(self, model: Decoder) -> str | None:
        """Return why a candidate does not pass, in one sentence; None if it does."""
        if model.fingerprint not in self._found:
            self._found[model.fingerprint] = self._gate.failing(self.dense, self._ask(model))
        return self._found[model.fingerprint]

    def _ask(self, model: Decoder) -> dict[str, float]:
        found: dict[str, float] = from_main_process(
            accuracies_of(model, self._gate, limit=self._questions, options=self._options)
        )
        return found

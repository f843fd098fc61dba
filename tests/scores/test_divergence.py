"""The change of the output: the reference's predictions are made once while there is room, else for each model."""

import pytest
import torch

from oracles import draw_windows, plain_divergence
from secateur.calibration.store import StateStore
from secateur.scores import divergence
from secateur.scores.divergence import OutputChange, kl_divergence
from secateur.scores.removal import RemovalProbe
from tiny_models import build

BLOCKS = (1, 5)


@pytest.mark.parametrize(("room", "predicted"), [(divergence._KEPT_BYTES, 1 + 2), (0, 2 + 2)])
def test_predictions_of_the_reference_are_kept_while_there_is_room(tiny, monkeypatch, room, predicted):
    decoder, windows = tiny("llama"), draw_windows()
    made, true_logits = [], divergence.logits
    monkeypatch.setattr(divergence, "_KEPT_BYTES", room)
    monkeypatch.setattr(divergence, "logits", lambda *given: (made.append(given), true_logits(*given))[1])
    with StateStore() as store:
        probe = RemovalProbe(decoder, windows, store, measure=OutputChange(store, kl_divergence))
        assert probe.loss(()) == 0.0
        found = [probe.loss(((block, "channels"),)) for block in BLOCKS]
    assert len(made) == predicted
    for block, lost in zip(BLOCKS, found, strict=True):
        module = build("llama")
        with torch.no_grad():
            module.model.layers[block].mlp.down_proj.weight.zero_()
        assert plain_divergence(decoder.module, module, windows) == pytest.approx(lost, abs=1e-6)

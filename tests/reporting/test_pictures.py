"""The picture of merged windows: drawn on CKA, refused without it."""

import pytest
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from oracles import draw_windows as draw_texts
from secateur.errors import InputError
from secateur.reporting import pictures
from secateur.scores.measure import score_model


def test_windows_are_outlined_on_both_maps(tiny, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Canvas, "savefig", lambda figure, *_, **__: drawn.append(figure))
    scores = score_model(tiny("llama"), draw_texts(), ["cka"])
    pictures.draw_windows(scores, [(1, 3), (5, 6)], tmp_path / "windows.png")
    for axes in drawn[0].axes[:2]:
        boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        assert [(*box.get_xy(), box.get_width(), box.get_height()) for box in boxes] == [
            (0.5, 0.5, 3, 3),
            (4.5, 4.5, 2, 2),
        ]


def test_without_cka(tiny, tmp_path):
    scores = score_model(tiny("llama"), draw_texts(), ["cosine"])
    with pytest.raises(InputError, match="do not hold 'cka'"):
        pictures.draw_windows(scores, [(1, 3)], tmp_path / "windows.png")
    assert list(tmp_path.iterdir()) == []

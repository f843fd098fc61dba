"""The gate: the share of a probe that is kept, by hand, and what is refused."""

import pytest

from secateur.errors import InputError
from secateur.evaluation import gate as gates
from secateur.evaluation.gate import Gate, accuracies_of, kept_of
from secateur.evaluation.probes import PROBES, questions
from secateur.evaluation.stability import Outcome

FLOOR = PROBES["probe-sort"].chance


def test_reading():
    assert Gate.read("probes:0.8") == Gate(tuple(PROBES), 0.8)
    assert Gate.read(" probe-copy, probe-sort ,probe-copy") == Gate(("probe-copy", "probe-sort"), 0.9)
    assert str(Gate.read("probes")) == "probes:0.9"
    assert str(Gate.read("probe-copy,probe-sort:0.75")) == "probe-copy,probe-sort:0.75"
    assert Gate.read("probe-copy,probes:1").probes == ("probe-copy", *(name for name in PROBES if name != "probe-copy"))


@pytest.mark.parametrize(
    "text", ["", "gsm8k:0.9", "probe-copy,reasoning", "probes:0", "probes:1.1", "probes:", "probes:x"]
)
def test_what_is_no_gate(text):
    with pytest.raises(InputError, match=r"probe-copy|probes:0\.9"):
        Gate.read(text)


def test_the_share_kept_is_counted_from_the_floor():
    assert pytest.approx((1 / 2 + 1 / 6 + 1 / 24 + 1 / 720) / 4) == FLOOR
    assert kept_of("probe-sort", 0.8, 0.8) == 1
    assert kept_of("probe-sort", 0.8, FLOOR) == 0
    assert kept_of("probe-sort", 0.8, 0.5) == pytest.approx((0.5 - FLOOR) / (0.8 - FLOOR))
    assert kept_of("probe-sort", 0.8, 0.0) < 0


def test_a_model_passes_up_to_the_share_and_not_below():
    gate, dense = Gate(("probe-format", "probe-sort"), 0.9), {"probe-format": 0.5, "probe-sort": 0.8}
    least = FLOOR + 0.9 * (0.8 - FLOOR)
    assert gate.failing(dense, {"probe-format": 0.45, "probe-sort": least}) is None
    assert gate.failing(dense, dense) is None
    assert gate.failing(dense, {"probe-format": 0.45, "probe-sort": least - 0.01}).startswith("keeps 88% of probe-sort")
    said = gate.failing(dense, {"probe-format": 0.25, "probe-sort": 0.1})
    assert said == (
        f"keeps 0% of probe-sort (accuracy 0.10, dense 0.80, floor {FLOOR:.2f}) and 50% of probe-format "
        "(accuracy 0.25, dense 0.50, floor 0.00); the gate asks for 90%"
    )


def test_what_the_dense_model_cannot_do_does_not_count():
    gate = Gate(("probe-format", "probe-sort"))
    dense = {"probe-format": 0.5, "probe-sort": FLOOR + 0.09}
    assert gate.able(dense) == ("probe-format",)
    assert gate.failing(dense, {"probe-format": 0.5, "probe-sort": 0.0}) is None
    assert gate.able(dense | {"probe-sort": FLOOR + 0.1}) == gate.probes
    gate.require(dense)
    with pytest.raises(InputError, match=r"can do none of its probes \(probe-format 0\.09 \(floor 0\.00\), probe-sort"):
        gate.require(dense | {"probe-format": 0.09})


def test_accuracies_are_those_of_eval(bundled, monkeypatch):
    def answers(models, asked, **_):
        assert models == {"model": bundled}
        assert (asked.names, asked.limit) == (("probe-sort", "probe-copy"), 6)
        return {
            "model": [Outcome(name, {"acc": number / 10}, {}, (), {}, "") for number, name in enumerate(asked.names)]
        }

    monkeypatch.setattr(gates, "ask_tasks", answers)
    assert accuracies_of(bundled, Gate(("probe-sort", "probe-copy")), limit=6) == {"probe-sort": 0.0, "probe-copy": 0.1}


def test_a_few_questions_are_of_every_level():
    shown = [one.context.rpartition("\n\n")[2] for one in questions(PROBES["probe-format"])[:6]]
    assert len({one.partition(" Words")[0] for one in shown}) == 6

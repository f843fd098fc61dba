"""The training loop on a small regression, against a plain loop, and what happens when it is disturbed."""

import itertools
import math

import pytest
import torch
from torch import nn

from secateur.errors import InputError, NumericsError
from secateur.run_options import RunOptions
from secateur.training.run_folder import RunFolder
from secateur.training.settings import TrainingSettings
from secateur.training.trainer import TrainingRun, train

CPU = torch.device("cpu")
FEATURES = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
SETTINGS = TrainingSettings(learning_rate=0.05, final_learning_rate=0.01, batch_size=8, evaluations=4, clip=0.5)


class Regression(nn.Module):
    """Learns `features · (1, 2, 3, 4)`; an item counts as often as its number modulo 3, plus one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.seen = []
        self.before = lambda tokens: None

    def forward(self, tokens, labels=None):
        self.before(tokens)
        if self.training:
            self.seen.append(tokens[:, 0].tolist())
        features = FEATURES[tokens[:, 0]]
        errors = (features @ self.weight - features @ torch.tensor([1.0, 2.0, 3.0, 4.0])) * self.frozen
        times = tokens[:, 0] % 3 + 1
        return (errors.square() * times).sum(), times.sum()


class Numbers:
    def __init__(self, numbers):
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, item):
        return {"tokens": torch.tensor([self.numbers[item]])}


DATA, HELD_OUT = Numbers(range(200)), Numbers(range(200, 256))


def run(objective, settings=SETTINGS, *, data=DATA, held_out=HELD_OUT, folder=None, recipe=None):
    options = RunOptions(work=folder)
    return train(objective, data, held_out, settings, TrainingRun(recipe=recipe or {}), device=CPU, options=options)


def mean_loss(weight, numbers):
    objective = Regression()
    objective.weight.data = weight.clone()
    loss, terms = objective(torch.tensor(list(numbers))[:, None])
    return float(loss.detach() / terms)


def test_it_is_adamw_with_a_cosine_and_clipping():
    objective = Regression()
    outcome = run(objective)
    assert outcome.steps == outcome.planned == 25
    assert outcome.tokens == 200
    assert sorted(itertools.chain(*objective.seen)) == list(range(200)), "each window once"
    plain = Regression()
    optimizer = torch.optim.AdamW([plain.weight], lr=0.05, weight_decay=1e-3)
    losses = []
    for step, numbers in enumerate(objective.seen):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 + (0.05 - 0.01) * (1 + math.cos(math.pi * step / 25)) / 2
        optimizer.zero_grad()
        loss, terms = plain(torch.tensor(numbers)[:, None])
        (loss / terms).backward()
        losses.append(float(loss.detach() / terms))
        nn.utils.clip_grad_norm_([plain.weight], 0.5)
        optimizer.step()
    torch.testing.assert_close(objective.weight, plain.weight, rtol=1e-5, atol=1e-6)
    assert [entry["loss"] for entry in outcome.curve if "loss" in entry] == pytest.approx(losses, rel=1e-4)
    assert torch.equal(objective.frozen, torch.ones(1))
    held_out = [entry["held_out_loss"] for entry in outcome.curve if "held_out_loss" in entry]
    assert len(held_out) == 5
    assert outcome.start_loss == held_out[0] == pytest.approx(mean_loss(torch.zeros(4), range(200, 256)))
    assert outcome.best_loss == min(held_out) == pytest.approx(mean_loss(objective.weight, range(200, 256)))


def test_micro_batches_change_nothing():
    whole, parts = Regression(), Regression()
    run(whole, SETTINGS.model_copy(update={"micro_batch": 8}))
    run(parts, SETTINGS.model_copy(update={"micro_batch": 3}))
    assert max(map(len, parts.seen)) == 3
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-5, atol=1e-6)


def run_out_of_memory(objective, most):
    """Let an objective fit batches of at most so many items."""

    def refuse(tokens):
        if len(tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    objective.before = refuse
    return objective


def test_out_of_memory_takes_smaller_micro_batches():
    whole, tight = Regression(), run_out_of_memory(Regression(), 3)
    run(whole)
    run(tight)
    assert max(map(len, tight.seen)) == 2
    torch.testing.assert_close(tight.weight, whole.weight, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="out of memory with micro_batch=1; take fewer windows"):
        run(run_out_of_memory(Regression(), 0))


class Dropped(Regression):
    """With dropout, which draws from the generator that a run that goes on has to find where it was."""

    def forward(self, tokens):
        loss, terms = super().forward(tokens)
        return loss + nn.functional.dropout(self.weight, 0.5, self.training).sum(), terms


@pytest.mark.parametrize(("epochs", "kind"), [(1, Regression), (2, Regression), (2, Dropped)])
def test_a_killed_run_goes_on_bit_equal(epochs, kind, tmp_path):
    settings = SETTINGS.model_copy(update={"epochs": epochs, "save_minutes": 1e-9})
    whole = kind()
    expected = run(whole, settings)
    killed = kind()

    def stop(_):
        if killed.training and len(killed.seen) == 11 * epochs + 4:
            raise KeyboardInterrupt

    killed.before = stop
    with pytest.raises(KeyboardInterrupt):
        run(killed, settings, folder=tmp_path / "run")
    resumed = kind()
    outcome = run(resumed, settings, folder=tmp_path / "run")
    assert killed.seen + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)
    same = ("steps", "tokens", "start_loss", "best_loss", "best_step")
    assert all(getattr(outcome, name) == getattr(expected, name) for name in same)
    assert [(e["step"], e.get("loss")) for e in outcome.curve] == [(e["step"], e.get("loss")) for e in expected.curve]
    again = Regression()
    run(again, settings, folder=tmp_path / "run")
    assert not again.seen, "a finished run is not trained again"

    assert torch.equal(again.weight, whole.weight)


def test_the_best_state_is_kept_and_a_run_without_gain_stops():
    objective = Regression()
    outcome = run(objective, SETTINGS.model_copy(update={"learning_rate": 3.0, "evaluations": 25, "patience": 2}))
    losses = [entry["held_out_loss"] for entry in outcome.curve if "held_out_loss" in entry]
    assert 1 <= outcome.best_step == outcome.steps - 2 < outcome.planned - 2
    assert outcome.stop_reason == "no-gain"
    assert "without a gain" in outcome.stopped
    assert outcome.best_loss == min(losses) < losses[-1]
    assert mean_loss(objective.weight, range(200, 256)) == pytest.approx(outcome.best_loss)


def nan_from(step):
    objective = Regression()

    def spoil(_):
        if objective.training and len(objective.seen) == step:
            objective.frozen.data.fill_(math.nan)

    objective.before = spoil
    return objective


def test_nan_stops_with_the_last_good_state():
    objective = nan_from(15)
    outcome = run(objective)
    assert outcome.stop_reason == outcome.describe()["stop_reason"] == "nan"
    assert outcome.stopped.startswith("stopped at step 16: the loss or its gradient is NaN")
    assert outcome.best_step == 12
    assert mean_loss(objective.weight, range(200, 256)) == pytest.approx(outcome.best_loss)


def test_nan_before_any_gain_is_an_error():
    with pytest.raises(NumericsError, match="NaN or infinite, before any improvement"):
        run(nan_from(2))


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(Regression(), folder=tmp_path / "run", recipe={"texts": "a"})
    with pytest.raises(InputError, match=r"holds a run of another recipe \(other texts\)"):
        run(Regression(), folder=tmp_path / "run", recipe={"texts": "b"})
    with pytest.raises(InputError, match=r"other training"):
        run(Regression(), SETTINGS.model_copy(update={"clip": 1.0}), folder=tmp_path / "run", recipe={"texts": "a"})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not the folder of a training run"):
        RunFolder(tmp_path, {})


def test_too_little_text():
    with pytest.raises(InputError, match="5 windows to train on and 56 held out are too few for steps of 8"):
        run(Regression(), data=Numbers(range(5)))
    with pytest.raises(InputError, match="0 held out"):
        run(Regression(), held_out=Numbers([]))

"""Text that a model writes itself, `diverse`, and how many windows a model needs."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

import secateur
from sample_texts import prose
from secateur.data import diverse, own_text
from secateur.data.texts import open_texts, windows_for, windows_needed, without_own
from secateur.errors import InputError, NumericsError
from secateur.models.opening import open_model, open_shapes
from secateur.progress import SILENT
from secateur.run_options import RunOptions
from tiny_models import BOS, EOS, build, build_tokenizer, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("own"), tokenizer=True, blocks=2)


@pytest.fixture
def model(folder, tmp_path, monkeypatch):
    """Return a small model with a tokenizer and a chat template, and a cache of its own."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return open_model(folder)


def written(model, count=6, *, seed=0, progress=SILENT, **settings):
    options = RunOptions(seed=seed, progress=progress)
    return windows_for(model, "self", windows=count, seq_len=32, options=options, **settings)


def test_the_same_call_finds_the_same_windows_without_writing_again(model, monkeypatch):
    first = written(model)
    assert first.tokens.shape == (6, 32)
    assert first.mask is None
    assert first.fingerprint.startswith(f"self({model.fingerprint[:16]}, calibration):sha256:")
    monkeypatch.setattr(own_text, "_written", lambda *_: pytest.fail("written again"))
    assert torch.equal(written(model).tokens, first.tokens)


def test_written_again_from_nothing_it_is_the_same(model, tmp_path, monkeypatch):
    first = written(model)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "another"))
    assert torch.equal(written(model).tokens, first.tokens)


def test_seed_part_and_model_give_other_text(model, tmp_path):
    other = open_model(save_tiny("llama", tmp_path / "other", tokenizer=True, blocks=2, seed=5))
    found = [written(model), written(model, seed=1), written(model, split="held-out"), written(other)]
    assert len({windows.fingerprint for windows in found}) == 4
    assert len({tuple(windows.tokens.flatten().tolist()) for windows in found}) == 4


def test_a_skeleton_writes_the_same(model, folder, tmp_path, monkeypatch):
    first = written(model)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "another"))
    thin = open_model(folder, skeleton=True)
    assert torch.equal(written(thin).tokens, first.tokens)
    assert all(parameter.is_meta for parameter in thin.module.parameters()), "let go afterwards"


def test_the_tokens_are_those_the_model_gives_with_their_probabilities(model, monkeypatch):
    """Each token drawn was likely in the plain forward pass over the window: the cache is used rightly."""
    monkeypatch.setattr(own_text, "_sample", lambda logits, _: logits.argmax(dim=-1).tolist())
    monkeypatch.setattr(own_text, "FEWEST_KINDS", 0)
    tokens = written(model, count=4).tokens
    with torch.inference_mode():
        best = model.module(input_ids=tokens).logits.argmax(dim=-1)
    even = tokens[::2]  # from one token each, and nothing forced unless a text ends
    unforced = (even[:, :-1] != EOS) & (torch.arange(31) > 0)
    assert (best[::2, :-1] == even[:, 1:])[unforced].all()


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([[0.0, 0.5, 0.125, 0.375]])
    draws = [np.random.default_rng(0)]
    found = [own_text._sample(probabilities.log(), draws)[0] for _ in range(4000)]
    counts = np.bincount(found, minlength=4) / 4000
    assert np.abs(counts - probabilities.numpy()[0]).max() < 0.03
    assert counts[0] == 0


def test_a_template_that_writes_a_book_is_refused(model):
    model.tokenizer.chat_template = "[" * 100_000
    with pytest.raises(InputError, match="writes 100,000 characters before the model begins"):
        written(model)


def test_half_begin_with_the_chat_template_and_half_with_one_token(model):
    texts = [model.tokenizer.decode(row) for row in written(model, count=8).tokens]
    assert [text.startswith("<bos>user: ") for text in texts] == [False, True] * 4
    plain = dataclasses.replace(model, tokenizer=copy.deepcopy(model.tokenizer), fingerprint="plain")
    plain.tokenizer.chat_template = None
    texts = [model.tokenizer.decode(row) for row in written(plain, count=8).tokens]
    assert not any(text.startswith("<bos>") for text in texts)


def test_windows_start_with_bos_once_where_they_shall(model):
    tokens = written(model, bos="always").tokens
    assert (tokens[:, 0] == BOS).all()
    assert (tokens[:, 1] != BOS).all()


def test_a_text_that_ends_is_followed_by_another(model, monkeypatch):
    monkeypatch.setattr(own_text, "_sample", lambda logits, draws: [int(draw.integers(2, 9)) for draw in draws])
    tokens = windows_for(model, "self", windows=16, seq_len=64).tokens
    after = tokens[1::2, 1:][tokens[1::2, :-1] == EOS]
    assert len(after)
    assert (after == BOS).all(), "the chat template begins with it"


def test_the_model_is_asked_in_batches(model, monkeypatch):
    monkeypatch.setattr(own_text, "AT_A_TIME", 3)
    seen = []

    def progress(items, description, total):
        for number, item in enumerate(items, 1):
            seen.append((number, total))
            yield item

    assert len(written(model, count=7, progress=progress)) == 7
    assert seen[-1] == (96, 96)


def test_a_model_that_degenerates_is_told(model):
    broken = dataclasses.replace(model, module=copy.deepcopy(model.module), fingerprint="broken")

    def stuck(_, __, logits):
        logits[..., 7] += 1000.0
        return logits

    broken.module.lm_head.register_forward_hook(stuck)
    with pytest.raises(InputError, match=r"degenerates when it writes: 6 of 6 windows hold fewer than 5 different"):
        written(broken)


def test_a_model_with_nan_is_told(model):
    broken = dataclasses.replace(model, module=copy.deepcopy(model.module), fingerprint="broken")
    broken.module.lm_head.register_forward_hook(lambda *parts: parts[-1] * float("nan"))
    with pytest.raises(NumericsError, match="NaN while the model writes"):
        written(broken)


def test_what_cannot_be_written_is_refused(model):
    with pytest.raises(InputError, match="self has no end; say how many windows"):
        windows_for(model, "self", windows=None, seq_len=32)
    with pytest.raises(InputError, match="open it for a model"):
        open_texts("self", model.tokenizer, windows=2, seq_len=32)
    with pytest.raises(InputError, match="no tokenizer"):
        written(dataclasses.replace(model, tokenizer=None))


def test_a_damaged_file_in_the_cache_is_written_again(model, tmp_path):
    first = written(model)
    (kept,) = (tmp_path / "cache" / "own-text").glob("*.npy")
    kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(written(model).tokens, first.tokens)


def test_a_model_without_a_fingerprint_keeps_nothing(model, tmp_path):
    written(dataclasses.replace(model, fingerprint=""))
    assert not (tmp_path / "cache").exists()


def test_own_text_in_a_mixture(model, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(map(prose, range(20))))
    source = f"{tmp_path / 'a.txt'}:1,self:3"
    windows = windows_for(model, source, windows=8, seq_len=32)
    assert windows.parts == (str(tmp_path / "a.txt"), "self")
    assert windows.part_of.tolist().count(1) == 6
    own = written(model).tokens
    assert sorted(windows.tokens[windows.part_of == 1].tolist()) == sorted(own.tolist())
    assert f"self({model.fingerprint[:16]}, calibration):0.75" in windows.fingerprint
    assert without_own(windows) == str(tmp_path / "a.txt")
    padded = windows_for(model, source, windows=8, seq_len=32, pack=False)
    assert padded.mask[padded.part_of == 1].all()


def test_for_a_dry_run_nothing_is_written(folder, monkeypatch):
    monkeypatch.setattr(own_text, "_written", lambda *_: pytest.fail("written"))
    windows = written(open_shapes(folder))
    assert windows.tokens.shape == (6, 32)
    assert "not written yet" in windows.notes[0]


def test_what_a_pruned_model_writes_is_noted(model):
    pruned = secateur.prune(model, secateur.make_plan(model, method="last-n", blocks=1))
    assert "written by the pruned model" in written(pruned).notes[0]


# Diverse


@pytest.fixture
def long(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return open_model(build("llama", blocks=2), tokenizer=build_tokenizer())


def test_diverse_is_code_prose_and_own_text(long):
    windows = windows_for(long, "diverse", windows=9, seq_len=32)
    assert windows.parts == ("python-stdlib", "python-docs", "self")
    assert [windows.part_of.tolist().count(part) for part in range(3)] == [3, 3, 3]
    assert windows.source == "python-stdlib,python-docs,self", "what opens the same again"
    assert windows.notes[:2] == (
        "diverse is python-stdlib, python-docs, self",
        "no questions and answers (alpaca): the hub cannot be reached",
    )
    again = windows_for(long, windows.source, windows=9, seq_len=32)
    assert again.fingerprint == windows.fingerprint


def test_diverse_is_what_is_read_without_a_word(long):
    assert windows_for(long, None, windows=3, seq_len=32).parts == ("python-stdlib", "python-docs", "self")
    assert windows_for(long, None, windows=2, seq_len=32, split="held-out").parts == ("python-stdlib", "python-docs")


def test_diverse_has_questions_where_the_hub_is_reachable(monkeypatch, long):
    monkeypatch.setattr(diverse, "hub_is_reachable", lambda: True)
    own = own_text.OwnText(long)
    assert diverse.parts_of_diverse(8, "calibration", own)[0] == "python-stdlib,python-docs,self,alpaca"
    assert diverse.parts_of_diverse(8, "held-out", own)[0] == "python-stdlib,python-docs"


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), OSError("no route"), None])
def test_whether_the_hub_answers(monkeypatch, error):
    class Session:
        def head(self, *_, **__):
            if error is not None:
                raise error

    diverse.hub_is_reachable.cache_clear()
    assert not diverse.hub_is_reachable(), "HF_HUB_OFFLINE is set in tests"
    diverse.hub_is_reachable.cache_clear()
    monkeypatch.setattr(diverse.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(diverse, "get_session", Session)
    assert diverse.hub_is_reachable() is (error is None)
    diverse.hub_is_reachable.cache_clear()


def test_diverse_leaves_own_text_out_where_it_would_do_harm_or_take_long(long):
    def of(windows, split="calibration", model=long):
        return diverse.parts_of_diverse(windows, split, None if model is None else own_text.OwnText(model))

    assert of(64, "held-out")[0] == "python-stdlib,python-docs"
    pruned = dataclasses.replace(long, history=({"plan": {}},))
    assert "no text of the model's own: the model is pruned" in of(64, model=pruned)[1]
    assert "would take long" in of(600)[1][1]
    assert "there is no model" in of(64, model=None)[1][1]
    assert of(1)[0] == "python-stdlib"
    assert of(2)[0] == "python-stdlib,python-docs"
    with pytest.raises(InputError, match=r"diverse is a mixture: .* so give one"):
        of(None)


def test_diverse_is_no_part_of_a_mixture(long):
    with pytest.raises(InputError, match=r"is a mixture itself .* python-stdlib,python-docs,self"):
        windows_for(long, "diverse:1,python-docs:1", windows=4, seq_len=32)


def test_diverse_without_a_manual(long, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    parts, notes = diverse.parts_of_diverse(8, "held-out", own_text.OwnText(long))
    assert parts == "python-stdlib"
    assert "no python-docs" in notes[1]


# How many


def test_windows_by_need_give_the_widest_projection_32_rows_per_input(bundled, tiny):
    assert bundled.config.intermediate_size == 512
    assert windows_needed(bundled, 1024) == 32, "at least"
    assert windows_needed(bundled, 128) == 512 * 32 // 128
    assert windows_needed(bundled, 8) == 128, "at most"
    experts = tiny("mixtral")  # 4 experts, 2 of them for each token, 48 channels
    assert windows_needed(experts, 32) == 32 * 48 * 4 // 2 // 32
    assert windows_needed(tiny("gpt2"), 16) == 32 * 48 // 16


def test_auto_is_a_number_of_windows(bundled):
    windows = windows_for(bundled, "python-stdlib", windows="auto", seq_len=64)
    assert len(windows) == windows_needed(bundled, 64)


@pytest.mark.parametrize(
    ("method", "settings", "count"),
    [("shortgpt", {}, 32), ("obs-width", {}, 128), ("obs-width", {"repair": False}, 32)],
)
def test_a_plan_takes_more_text_for_a_repair(method, settings, count, bundled):
    given = {"texts": "python-stdlib", "seq_len": 128, "remove": 0.1}
    plan = secateur.make_plan(bundled, method=method, settings=settings, **given)
    assert plan.texts["windows"] == count

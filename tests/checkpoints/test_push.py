"""What goes to the hub, and what is refused; a stand-in with the interface of HfApi takes the place of the hub."""

import inspect
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

import secateur
from secateur import make_plan, open_model, prune, push, save
from secateur.checkpoints.push import CardFacts
from secateur.data.windows import Windows
from secateur.errors import InputError, SecateurWarning
from secateur.evaluation.results import append_results
from tiny_models import VOCABULARY, save_tiny

REPO = "me/small-model"


class Hub:
    """Remembers what it is asked; calls that the real HfApi would not take are refused."""

    def __init__(self, error=None):
        self.calls = {}
        self.error = error

    def __getattr__(self, name):
        def call(*args, **kwargs):
            inspect.signature(getattr(HfApi, name)).bind(self, *args, **kwargs)
            if self.error:
                raise self.error
            self.calls[name] = kwargs
            return SimpleNamespace(commit_url=f"https://huggingface.co/{REPO}/commit/1")

        return call


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """Stand in for the hub's client."""
    stand_in = Hub()
    monkeypatch.setattr("secateur.checkpoints.push.HfApi", lambda: stand_in)
    return stand_in


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model and its cut, checked, written once."""
    root = tmp_path_factory.mktemp("push")
    source = save_tiny("llama-tied", root / "source", dtype=torch.bfloat16, tokenizer=True)
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: [en]\n---\n# original\n"
    )
    (source / "LICENSE").write_text("do as you like")
    model = open_model(source)
    save(prune(model, make_plan(model, method="last-n", blocks=3)), root / "cut")
    return root


@pytest.fixture
def cut(folders, tmp_path):
    shutil.copytree(folders / "cut", tmp_path / "cut")
    return tmp_path / "cut"


def test_all_files_go_with_a_complete_card(cut, hub):
    (cut / ".cache").mkdir()
    (cut / ".cache" / "notes").write_text("mine")
    said = push(cut, REPO, card=CardFacts(base_model="them/dense"), revision="small", token="secret")
    assert hub.calls["create_repo"] == {"private": True, "exist_ok": True, "token": "secret"}
    assert hub.calls["create_branch"]["branch"] == hub.calls["upload_folder"]["revision"] == "small"
    sent = hub.calls["upload_folder"]
    assert set(sent["allow_patterns"]) == {file.name for file in cut.iterdir() if file.is_file()} == set(said["files"])
    assert said["bytes"] == sum(file.stat().st_size for file in cut.iterdir() if file.is_file())
    assert "last-n" in sent["commit_message"]
    assert said["url"].endswith("/commit/1")
    data = ModelCard.load(cut / "README.md").data.to_dict()
    assert data["license"] == "other"
    assert (data["license_name"], data["license_link"]) == ("mine", "LICENSE")
    assert (data["base_model"], data["base_model_relation"]) == ("them/dense", "finetune")
    assert data["library_name"] == "transformers"
    assert set(data["tags"]) == {"secateur", "pruned", "last-n"}
    assert f'from_pretrained("{REPO}")' in (cut / "README.md").read_text()


def test_a_dry_run_sends_and_changes_nothing(cut, hub):
    before = (cut / "README.md").read_bytes()
    with pytest.warns(SecateurWarning, match="no base model"):
        said = push(cut, REPO, dry_run=True)
    assert hub.calls == {}
    assert said["url"] is None
    assert said["files"]["model.safetensors"] == (cut / "model.safetensors").stat().st_size
    assert (cut / "README.md").read_bytes() == before


def test_results_are_shown_and_what_a_person_wrote_stays(cut, folders, tmp_path):
    (cut / "README.md").write_text((cut / "README.md").read_text() + "\nTrained with love.\n")
    windows = Windows.of(torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0)))
    results = secateur.evaluate(open_model(cut), against=open_model(folders / "source"), texts=windows)
    append_results(tmp_path / "results.jsonl", results)
    for repo in ("me/other", REPO):
        push(cut, repo, card=CardFacts(results=tmp_path, base_model="them/dense"))
    card = ModelCard.load(cut / "README.md")
    assert card.text.count("Trained with love.") == card.text.count("## Results") == 1
    assert f"| {results[0].value:.4g} | {results[1].value:.4g} |" in card.text
    assert f'from_pretrained("{REPO}")' in card.text
    (metric,) = card.data.eval_results
    assert (metric.metric_type, metric.metric_value) == ("perplexity", round(results[0].value, 4))
    append_results(tmp_path / "other.jsonl", secateur.evaluate(open_model(folders / "source"), texts=windows))
    with pytest.raises(InputError, match="measured on another model"):
        push(cut, REPO, card=CardFacts(results=tmp_path / "other.jsonl"))


def _forget_the_check(folder):
    record = json.loads((folder / "secateur.json").read_text())
    (folder / "secateur.json").write_text(json.dumps({k: v for k, v in record.items() if k != "check"}))


def _other_version(folder):
    record = json.loads((folder / "secateur.json").read_text())
    (folder / "secateur.json").write_text(json.dumps(record | {"history": [{"plan": {"format": 2}}]}))


def _cut_off_the_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "secateur.json").unlink(), "not written by secateur"),
        (lambda folder: (folder / "secateur.json").write_text('{"secateur": "0", "command": "eval"}'), "secateur eval"),
        (_other_version, "not a record of this version"),
        (_forget_the_check, "without --no-check"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
        (_cut_off_the_weights, "Nothing was sent"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_what_is_not_a_finished_checkpoint_is_refused(cut, damage, message, hub):
    damage(cut)
    with pytest.raises(InputError, match=message):
        push(cut, REPO)
    assert hub.calls == {}


def test_names_and_a_hub_that_refuses(cut, hub, monkeypatch):
    for repo in ("no-owner", "a/b/c", "me/-x"):
        with pytest.raises(InputError, match="owner/name"):
            push(cut, repo, dry_run=True)
    hub.error = LocalTokenNotFoundError("no token")
    with pytest.raises(InputError, match="hf auth login"), pytest.warns(SecateurWarning):
        push(cut, REPO)
    monkeypatch.undo()
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"), pytest.warns(SecateurWarning):
        push(cut, REPO)

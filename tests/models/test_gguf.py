"""GGUF files as models: what they become, what is kept of them, and what is refused."""

import dataclasses
import json
import shutil
import warnings

import gguf as package
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

import secateur
from gguf_files import CHAT, small_llama, small_tokenizer, write_gguf
from secateur.errors import InputError, ModelError, SecateurWarning
from secateur.models import gguf
from secateur.models.inspection import inspect
from secateur.models.opening import open_model, open_shapes

TEXT = "def hello(self):\n    return 'it is 1234'\n"


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """Return a function that writes a model in one kind of GGUF once."""
    made = {}

    def file(kind):
        if kind not in made:
            model = small_llama(len(tokenizer))
            made[kind] = write_gguf(tmp_path_factory.mktemp(kind) / f"tiny.{kind}.gguf", model, tokenizer, kind)
        return made[kind]

    return file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def logits(module, tokenizer):
    with torch.inference_mode():
        return module(**tokenizer(TEXT, return_tensors="pt")).logits.float()


@pytest.mark.parametrize(
    ("kind", "dtype", "closeness"), [("F32", "float32", 0.0), ("F16", "float16", 0.0), ("Q8_0", "float16", 3e-2)]
)
def test_a_file_computes_what_its_model_does(files, tokenizer, kind, dtype, closeness):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoder = open_model(files(kind))
    model = small_llama(len(tokenizer))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    expected = logits(model, tokenizer)
    assert (logits(decoder.module, tokenizer) - expected).abs().max() <= closeness * expected.abs().max()
    assert decoder.saved_dtype == getattr(torch, dtype)
    assert decoder.source == str(files(kind))
    assert decoder.gguf == files(kind)
    said = [str(one.message) for one in caught if issubclass(one.category, SecateurWarning)]
    lossy = [f"tiny.{kind}.gguf: {kind} dequantised to {dtype}; the original weights would be better."]
    assert said == (lossy if kind == "Q8_0" else [])


def test_tokenizer_chat_template_and_licence_come_along(files, tokenizer, tmp_path):
    decoder = open_model(files("F16"))
    assert decoder.tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert decoder.tokenizer.chat_template == CHAT
    secateur.save(decoder, tmp_path / "saved", check=False)
    assert "license: apache-2.0" in (tmp_path / "saved" / "README.md").read_text()


def test_bfloat16_stays(tokenizer, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", small_llama(len(tokenizer)), tokenizer, "BF16")
    assert open_model(file).saved_dtype == torch.bfloat16


def test_weights_too_large_for_float16_become_bfloat16(tokenizer, tmp_path):
    model = small_llama(len(tokenizer))
    model.model.norm.weight.data[0] = 1e5
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, "Q8_0")
    with pytest.warns(SecateurWarning, match="Q8_0 dequantised to bfloat16"):
        assert open_model(file).saved_dtype == torch.bfloat16


def test_a_skeleton_and_the_fingerprint(files):
    whole, thin = (open_model(files("F16"), skeleton=skeleton) for skeleton in (False, True))
    assert thin.is_skeleton
    assert thin.fingerprint == whole.fingerprint


def test_a_folder_with_one_file_is_that_file(files, tmp_path):
    shutil.copy(files("F16"), tmp_path)
    assert open_model(tmp_path).gguf == tmp_path / "tiny.F16.gguf"


def test_safetensors_beside_a_file_go_first(files, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder("llama"), tmp_path / "both")
    shutil.copy(files("F16"), tmp_path / "both")
    assert open_model(tmp_path / "both").gguf is None


def test_a_pruned_model_knows_its_file(files):
    model = open_model(files("F16"))
    pruned = secateur.prune(model, secateur.make_plan(model, method="last-n", blocks=1))
    assert pruned.gguf == model.gguf


# The cache


def test_a_file_is_dequantised_once(files, cache, monkeypatch, tmp_path):
    first = open_model(files("F16"))
    assert first.folder.parent == cache
    monkeypatch.setattr(gguf, "_reading", lambda *_, **__: pytest.fail("read again"))
    moved = tmp_path / "moved.gguf"
    shutil.copy(files("F16"), moved)
    again = open_model(moved)
    assert again.folder == first.folder
    assert again.fingerprint == first.fingerprint
    assert again.gguf == moved


def test_to_say_what_a_job_needs_only_the_header_is_read(files, cache, monkeypatch):
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("weights were read"))
    shapes = open_shapes(files("F16"))
    facts = inspect(shapes)
    assert facts["fingerprint"].startswith("not known")
    assert facts["stored as"] == "float16"
    assert shapes.gguf == files("F16")
    monkeypatch.undo()
    assert shapes.parameter_count == open_model(files("F16")).parameter_count


def test_shapes_of_a_file_that_was_dequantised_have_its_fingerprint(files, cache):
    whole = open_model(files("F16"))
    assert open_shapes(files("F16")).fingerprint == whole.fingerprint


def test_a_killed_conversion_is_done_again(files, cache, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_write_record", killed)
    with pytest.raises(KeyboardInterrupt):
        gguf.dequantised(files("F16"))
    assert not [folder for folder in cache.iterdir() if not folder.name.startswith(".")]
    monkeypatch.undo()
    monkeypatch.setenv("SECATEUR_CACHE", str(cache.parent))
    half = cache / f".{gguf._cached(files('F16'), 'model').name}.killed.part"  # as SIGKILL leaves it
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert gguf.finished(files("F16")) is None
    assert open_model(files("F16")).block_count == 3


def test_a_record_that_cannot_be_read(files, cache):
    folder = open_model(files("F16")).folder
    (folder / gguf.RECORD).write_text("{")
    with pytest.raises(ModelError, match=r"not a valid record.* it is created again"):
        open_model(files("F16"))


def test_a_cache_that_cannot_be_written(files, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be written .* set SECATEUR_CACHE"):
        open_model(files("F16"))


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stand in for the hub with one repository: a folder, whose listing may fail."""
    folder = tmp_path / "repository"
    folder.mkdir()
    calls = []

    def snapshot_download(name, **settings):
        calls.append((name, settings["allow_patterns"]))
        return str(folder)

    def list_repo_files(name, **_):
        return [file.name for file in folder.iterdir()]

    monkeypatch.setattr("secateur.models.fetch.snapshot_download", snapshot_download)
    monkeypatch.setattr("secateur.models.fetch.list_repo_files", list_repo_files)
    return folder, calls


def test_a_repository_with_one_file(hub, files):
    folder, calls = hub
    shutil.copy(files("F16"), folder / "model.gguf")
    assert open_model("owner/name").gguf == folder / "model.gguf"
    assert calls[-1] == ("owner/name", ["model.gguf"])


def test_a_file_in_a_repository(hub, files):
    folder, calls = hub
    for name in ("model.Q4_0.gguf", "model.F16.gguf"):
        shutil.copy(files("F16"), folder / name)
    assert open_model("owner/name/model.F16.gguf").source == "owner/name/model.F16.gguf"
    assert calls == [("owner/name", ["model.F16.gguf"])]
    with pytest.raises(InputError, match=r"several GGUF files \(model.F16.gguf, model.Q4_0.gguf\); name one, such as "):
        open_model("owner/name")
    with pytest.raises(InputError, match="no such file on the hub"):
        open_model("owner/name/model.Q8_0.gguf")


def test_a_repository_that_was_fetched_before_and_no_network(hub, files, monkeypatch):
    folder, _ = hub
    shutil.copy(files("F16"), folder / "model.gguf")

    def offline(name, **_):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr("secateur.models.fetch.list_repo_files", offline)
    assert open_model("owner/name").gguf == folder / "model.gguf"


# What is refused


def test_what_is_not_a_gguf(tmp_path):
    for content, message in ((b"", "an empty file"), (b"\x7fELF" * 100, "not a GGUF file")):
        file = tmp_path / "model.gguf"
        file.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            open_model(file)


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.5, 0.999])
def test_a_truncated_file(files, tmp_path, share):
    whole = files("F16").read_bytes()
    file = tmp_path / "model.gguf"
    file.write_bytes(whole[: max(8, int(share * len(whole)))])
    with pytest.raises(ModelError, match=r"truncated or damaged .* copy it again"):
        open_shapes(file)


def test_an_architecture_that_transformers_does_not_read(tokenizer, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", small_llama(len(tokenizer)), tokenizer, architecture="olmo2")
    with pytest.raises(ModelError, match=r"cannot read the architecture 'olmo2' from GGUF, only .*llama, .*qwen3"):
        open_model(file)
    assert {"gpt_oss", "gemma2", "qwen35"} <= set(gguf.readable_architectures())


def test_missing_weights(tokenizer, tmp_path):
    gone = ("model.layers.1.mlp.up_proj.weight",)
    file = write_gguf(tmp_path / "model.gguf", small_llama(len(tokenizer)), tokenizer, without=gone)
    with pytest.raises(ModelError, match=r"has no weights for model.layers.1.mlp.up_proj.weight"):
        open_model(file)


def test_a_header_without_weights(tokenizer, tmp_path):
    model = small_llama(len(tokenizer))
    file = write_gguf(tmp_path / "vocabulary.gguf", model, tokenizer, without=tuple(model.state_dict()))
    with pytest.raises(ModelError, match="holds no weights"):
        open_model(file)


def test_split_files(files, tmp_path, tokenizer):
    for number in (1, 3):
        shutil.copy(files("F16"), tmp_path / f"model-{number:05d}-of-00003.gguf")
    for source in (tmp_path, tmp_path / "model-00001-of-00003.gguf"):
        with pytest.raises(ModelError, match=r"model-00002-of-00003.gguf is missing; copy all parts"):
            open_model(source)
    shutil.copy(files("F16"), tmp_path / "model-00002-of-00003.gguf")
    with pytest.raises(ModelError, match=r"one of 3 parts.*llama-gguf-split --merge .*model-00001-of-00003.gguf"):
        open_model(tmp_path / "model-00003-of-00003.gguf")
    part = (2, package.GGUFValueType.UINT16)
    renamed = write_gguf(tmp_path / "one.gguf", small_llama(len(tokenizer)), tokenizer, split__count=part)
    with pytest.raises(ModelError, match="one of 2 parts"):
        open_model(renamed)


def test_several_files_in_a_folder(files, tmp_path):
    for kind in ("F16", "Q8_0"):
        shutil.copy(files(kind), tmp_path)
    with pytest.raises(InputError, match=r"several GGUF files \(tiny.F16.gguf, tiny.Q8_0.gguf\); name one, such as .*"):
        open_model(tmp_path)


def test_without_the_package(files, monkeypatch, cache):
    monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'secateur\[gguf\]'"):
        open_model(files("F16"))


def test_positions_that_transformers_passes_over_are_told(tokenizer, tmp_path):
    yarn = ("yarn", package.GGUFValueType.STRING)
    model = small_llama(len(tokenizer))
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, llama__rope__scaling__type=yarn)
    with pytest.warns(SecateurWarning, match=r"does not read llama.rope.scaling.type of it"):
        open_model(file)


# Conversion


def test_convert_writes_a_proved_folder(files, tmp_path):
    record = secateur.convert(files("Q8_0"), tmp_path / "out", dtype="bfloat16")
    assert record["check"]["passed"]
    assert record["dtype"] == "bfloat16"
    assert open_model(tmp_path / "out").gguf is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "converted" in card
    assert "| step |" not in card
    assert json.loads((tmp_path / "out" / "secateur.json").read_text())["history"] == []


def test_convert_takes_an_open_model(tiny, tmp_path):
    secateur.convert(tiny("llama"), tmp_path / "out", dtype="float16", check=False)
    assert open_model(tmp_path / "out").saved_dtype == torch.float16


def test_the_command_line(files, tmp_path, warm_python):
    looked = warm_python.run("-m", "secateur", "inspect", files("Q8_0"), "--json")
    assert json.loads(looked.stdout)["blocks"] == "3 at model.layers"
    assert "warning: tiny.Q8_0.gguf: Q8_0 dequantised to float16" in looked.stderr.replace("\n", " ")
    done = warm_python.run("-m", "secateur", "convert", files("Q8_0"), "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "same logits" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_origins_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        gguf.Origin("a", "Q4_0", "float16").file = "b"

"""Checkpoints made to harm: impossible configurations, indexes that point elsewhere, pickles, pipes, other numbers."""

import json
import os
import pickle
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import ModelError
from secateur.models.opening import open_model
from secateur.models.shard_files import INDEX, files_in_index
from tiny_models import save_tiny


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of a tiny Llama's checkpoint, to be changed."""
    shutil.copytree(tiny_folder("llama", tokenizer=True), tmp_path / "model")
    return tmp_path / "model"


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


IMPOSSIBLE = {
    "num_attention_heads": [0, -4, 5, 10**7, 4.0, "4", True, 10**30],
    "num_key_value_heads": [0, 3, "2"],
    "num_hidden_layers": [0, -1, 10**7, 2.5, "8", [8]],
    "hidden_size": [0, -32, 10**9, "32"],
    "intermediate_size": [0, -1, 10**12, {}],
    "vocab_size": [0, -1, 10**10, 256.5],
    "max_position_embeddings": [0, -64, 10**12, "64"],
    "head_dim": [0, -8, "8"],
    "rope_theta": [0, -1, float("nan"), "10000"],
    "rms_norm_eps": [-1e-6, float("inf"), "small", 1e9],
    "hidden_act": ["softplux", 3, "", ["silu"]],
    "attention_dropout": [-0.1, 2],
    "tie_word_embeddings": ["no", 3],
    "layer_types": [["full_attention"] * 3, "full", [1] * 8],
    "architectures": ["LlamaForCausalLM", [3]],
    "model_type": [3, ["llama"]],
    "dtype": [32],
    "rope_parameters": [[], "linear"],
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_impossible_settings_are_refused_at_once_and_named(folder, key):
    for value in IMPOSSIBLE[key]:
        change(folder, **{key: value})
        for skeleton in (False, True):
            begun = time.process_time()
            with pytest.raises(ModelError, match=key):
                open_model(folder, skeleton=skeleton)
            assert time.process_time() - begun < 5, "nothing is built first"


@pytest.mark.parametrize("text", ["[]", "{", "3", '{"model_type": ' + "[" * 90_000, "\ufeff", '{"a": "\\ud800"}'])
def test_a_configuration_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        open_model(folder)


class Runs:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("name", ["evil.bin", "evil.pt", "model", "../evil.bin", "evil.bin\0.safetensors"])
@pytest.mark.parametrize("skeleton", [True, False])
def test_no_index_brings_a_pickle_to_torch(folder, name, skeleton, tmp_path):
    (folder / "evil.bin").write_bytes(pickle.dumps(Runs(tmp_path / "trace")))
    shutil.copy(folder / "evil.bin", folder / "evil.pt")
    shutil.copy(folder / "evil.bin", tmp_path / "evil.bin")
    weights = list(load_file(folder / "model.safetensors"))
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no plain name of a safetensors file"):
        open_model(folder, skeleton=skeleton)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "names", [{}, [], {"a": 3}, {"a": "../model.safetensors"}, {"a": "/tmp/model.safetensors"}, {"a": ".safetensors"}]
)
def test_what_an_index_may_not_name(folder, names):
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match="not a valid shard index"):
        files_in_index(folder)


def sharded(folder):
    name = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / name)
    places = dict.fromkeys(load_file(folder / name), name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / name


def test_a_link_out_of_a_local_folder_is_refused_and_one_into_the_hubs_cache_is_not(folder, tmp_path):
    shard = sharded(folder)
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    shard.rename(blobs / "0123")
    shard.symlink_to(blobs / "0123")
    with pytest.raises(ModelError, match="is a link that leaves the folder"):
        open_model(folder)
    snapshot = blobs.parent / "snapshots" / "main"
    snapshot.parent.mkdir()
    shutil.move(folder, snapshot)
    (snapshot / shard.name).unlink()
    (snapshot / shard.name).symlink_to("../../blobs/0123")
    assert open_model(snapshot).block_count == 8


def test_an_adapter_is_not_loaded_on_the_side(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds an adapter \(adapter_config.json\)"):
        open_model(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "model.safetensors"])
def test_pipes_and_devices_are_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match="not an ordinary file"):
        open_model(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="not an ordinary file"):
        open_model(folder)


def test_settings_of_a_terabyte_are_not_read(folder):
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="too many for settings"):
        open_model(folder)


@pytest.mark.parametrize("skeleton", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_weights_that_are_no_floating_point_numbers_are_refused(folder, skeleton, dtype):
    """Loading converts them without a word, and the scale that gave them meaning is lost."""
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} is of type .*, not a floating-point number"):
        open_model(folder, skeleton=skeleton)


def test_a_tokenizer_that_fails_when_it_is_used_is_refused_when_it_is_opened(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "-1"}))
    with pytest.raises(ModelError, match="the tokenizer cannot be read"):
        open_model(folder)


def test_configurations_of_all_families_are_possible(tmp_path):
    """The limits refuse nothing that a real configuration holds; those of other families are opened in their tests."""
    for name in ("gpt2", "opt", "bloom", "falcon", "gemma3_text", "qwen3_moe", "mixtral", "phi3", "secateur"):
        open_model(save_tiny(name, tmp_path / name))

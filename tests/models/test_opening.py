"""Opening models: what is refused and how it is said, dtypes, hub names, fingerprints."""

import inspect
import json
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Model,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from oracles import draw_tokens, forward, walk
from secateur import inspect as inspect_model
from secateur.checkpoints.save import save
from secateur.errors import InputError, ModelError
from secateur.jobs.job import memory_of
from secateur.models.fetch import read_config
from secateur.models.opening import open_model, open_shapes
from tiny_models import build, build_tokenizer, save_tiny

MODES = pytest.mark.parametrize("skeleton", [False, True], ids=["memory", "skeleton"])


@pytest.fixture
def folder(tmp_path):
    return save_tiny("llama", tmp_path / "model", blocks=2)


@pytest.fixture
def sharded(tmp_path):
    folder = save_tiny("llama", tmp_path / "model", blocks=4, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def edit_config(folder, **entries):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def use(decoder):
    """Touch every weight, as a skeleton only looks at them when they are needed."""
    return walk(decoder, draw_tokens(windows=1))


def tiny_encoder():
    config = BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return BertForMaskedLM(config)


# What opens


@MODES
def test_a_folder(folder, skeleton):
    decoder = open_model(folder, skeleton=skeleton)
    assert torch.equal(use(decoder), forward(build("llama", blocks=2), draw_tokens(windows=1)))
    assert (decoder.source, decoder.folder) == (str(folder), folder)
    assert (decoder.device.type, decoder.max_positions, decoder.block_count) == ("cpu", 64, 2)
    assert decoder.history == ()
    assert not decoder.module.training
    assert not any(parameter.requires_grad for parameter in decoder.module.parameters())
    assert open_model(str(folder), skeleton=skeleton).fingerprint == decoder.fingerprint


def test_a_skeleton_is_chosen_by_the_memory_that_is_free(folder, monkeypatch):
    import psutil

    assert not open_model(folder).is_skeleton
    free = psutil.virtual_memory()._replace(available=(folder / "model.safetensors").stat().st_size)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert open_model(folder).is_skeleton
    assert not open_model(folder, skeleton=False).is_skeleton


@MODES
def test_several_shards(sharded, skeleton):
    decoder = open_model(sharded, skeleton=skeleton)
    assert torch.equal(use(decoder), forward(build("llama", blocks=4), draw_tokens(windows=1)))


@MODES
def test_a_checkpoint_without_the_prefix_of_the_base_model(tmp_path, skeleton):
    """The hub's first gpt2 is one: `h.0.attn…`, no head, and a mask in each block that nobody needs."""
    module = build("gpt2", blocks=2)
    base = module.transformer
    assert isinstance(base, GPT2Model)
    base.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["GPT2LMHeadModel"])

    def add_masks(tensors):
        assert "h.0.ln_1.weight" in tensors
        for index in range(2):
            tensors[f"h.{index}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()

    edit_weights(tmp_path, add_masks)
    tokens = draw_tokens(windows=1)
    assert torch.equal(walk(open_model(tmp_path, skeleton=skeleton), tokens), forward(module, tokens))


def test_a_model_in_memory():
    module = build("llama", blocks=2).train()
    decoder = open_model(module)
    assert decoder.module is module
    assert decoder.folder is None
    assert decoder.tokenizer is None
    assert decoder.source == "LlamaForCausalLM"
    assert decoder.saved_dtype == torch.float32
    assert not module.training
    assert torch.equal(use(decoder), forward(build("llama", blocks=2), draw_tokens(windows=1)))
    assert decoder.fingerprint == open_model(build("llama", blocks=2)).fingerprint
    assert decoder.fingerprint != open_model(build("llama", blocks=2, seed=1)).fingerprint
    assert decoder.fingerprint != open_model(build("llama", blocks=3)).fingerprint


def test_a_model_in_memory_with_a_tokenizer(folder):
    tokenizer = build_tokenizer()
    assert open_model(build("llama", blocks=2), tokenizer=tokenizer).tokenizer is tokenizer
    assert open_model(AutoModelForCausalLM.from_pretrained(folder)).source == str(folder)


def test_the_bundled_model(bundled):
    assert (bundled.source, bundled.block_count, bundled.hidden_size) == ("bundled", 12, 192)
    assert bundled.saved_dtype == torch.bfloat16
    assert bundled.tokenizer is not None
    stored = load_file(bundled.folder / "model.safetensors")
    assert bundled.parameter_count == sum(tensor.numel() for tensor in stored.values())


def test_tokenizers(folder, tmp_path):
    assert open_model(folder).tokenizer is None
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert open_model(folder, tokenizer=str(tmp_path / "tokenizer")).tokenizer.vocab_size == 256
    build_tokenizer().save_pretrained(folder)
    assert open_model(folder).tokenizer.vocab_size == 256
    own = build_tokenizer()
    assert open_model(folder, tokenizer=own).tokenizer is own


def test_history_is_read(folder):
    (folder / "secateur.json").write_text(json.dumps({"history": [{"plan": 1}]}))
    assert open_model(folder).history == ({"plan": 1},)


# Dtypes and devices


@MODES
def test_arithmetic_is_float32_and_the_saved_dtype_stays(tmp_path, skeleton, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    save_tiny("llama", tmp_path, blocks=2, dtype=torch.bfloat16)
    decoder = open_model(tmp_path, skeleton=skeleton)
    assert decoder.saved_dtype == torch.bfloat16
    assert decoder.module.dtype == torch.float32
    with decoder.block(1) as block, decoder.outer():
        assert {p.dtype for p in (*block.parameters(), *decoder.module.lm_head.parameters())} == {torch.float32}
    expected = forward(build("llama", blocks=2, dtype=torch.bfloat16).float(), draw_tokens(windows=1))
    assert torch.equal(use(decoder), expected)


def test_bfloat16_is_kept_where_it_is_fast(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    save_tiny("llama", tmp_path, blocks=2, dtype=torch.bfloat16)
    assert open_model(tmp_path).module.dtype == torch.bfloat16
    assert open_model(tmp_path, dtype="float32").module.dtype == torch.float32


@MODES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_arithmetic_as_asked(folder, dtype, skeleton):
    decoder = open_model(folder, dtype=dtype, skeleton=skeleton)
    assert decoder.module.dtype == getattr(torch, dtype)
    assert decoder.saved_dtype == torch.float32
    with decoder.block(0) as block:
        assert {parameter.dtype for parameter in block.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_saved_dtype_is_looked_up_where_the_configuration_does_not_say(tmp_path, dtype):
    save_tiny("llama", tmp_path, blocks=2, dtype=dtype)
    edit_config(tmp_path, dtype=None)
    assert open_model(tmp_path).saved_dtype == dtype


@pytest.mark.parametrize(
    ("device", "each", "expected"),
    [("auto", 10.0, torch.device("cuda")), ("auto", 1.0, "auto"), ("auto", 0.5, None), ("cuda:1", 1.0, None)],
)
def test_a_model_is_spread_only_where_one_gpu_is_too_small(folder, monkeypatch, device, each, expected):
    """None: opened as a skeleton. Two GPUs, in each of which so many of these models would find room."""
    size = (folder / "model.safetensors").stat().st_size
    place = torch.device("cuda") if device == "auto" else torch.device(device)
    opened = []

    def note(*given, **_):
        opened.append(given[3] if len(given) > 3 else None)
        raise InputError("opened")

    monkeypatch.setattr("secateur.models.placement._device", lambda _: place)
    monkeypatch.setattr(
        "secateur.models.placement._all_gpus", lambda: (torch.device("cuda", 0), torch.device("cuda", 1))
    )
    monkeypatch.setattr("secateur.models.placement.free_memory", lambda _: each * size)
    monkeypatch.setattr("secateur.models.opening.whole_model", note)
    monkeypatch.setattr("secateur.models.opening.empty_model", lambda *_, **__: note())
    with pytest.raises(InputError, match="opened"):
        open_model(folder, device=device)
    assert opened == [expected]


def test_opened_for_its_shapes_it_says_how_the_job_will_hold_it(folder, monkeypatch):
    whole = open_shapes(folder)
    assert whole.is_skeleton
    assert not whole.by_blocks
    assert open_shapes(folder, skeleton=True).by_blocks
    monkeypatch.setattr("secateur.models.placement.Placement.holds", lambda *_: False)
    assert open_shapes(folder).by_blocks
    assert open_model(folder).by_blocks
    assert not open_model(folder, skeleton=False).by_blocks


@pytest.mark.parametrize("dtype", ["float8", "int8", ""])
def test_unknown_dtype(folder, dtype):
    with pytest.raises(InputError, match=r"unknown dtype .* float32, bfloat16, float16"):
        open_model(folder, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "", "cuda:99"])
def test_unknown_device(folder, device):
    with pytest.raises(InputError, match=f"device '{device}'"):
        open_model(folder, device=device)


# Places


@pytest.mark.parametrize("source", ["./nothing", "/nothing/here", "~/nothing", "nothing", "a/b/c"])
def test_no_such_folder(source):
    with pytest.raises(InputError, match="no such folder"):
        open_model(source)


def test_a_file_is_no_model(folder):
    with pytest.raises(InputError, match="no such folder"):
        open_model(folder / "config.json")


def test_a_hub_name_without_a_network():
    with pytest.raises(InputError, match="someone/nothing: no such folder, and the hub cannot be reached"):
        open_model("someone/nothing")


@pytest.mark.parametrize("name", ["some one/model", "owner/-model", "owner/model..", "owner/mod--el"])
def test_a_name_the_hub_would_not_take(name):
    with pytest.raises(InputError, match=r"not available on the hub|not a hub name"):
        open_model(name)


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub; gives the list of calls and lets the test say what is answered."""
    calls = []
    answer = {}
    signature = inspect.signature(huggingface_hub.snapshot_download)

    def snapshot_download(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        calls.append(bound.arguments)
        if isinstance(answer["is"], Exception):
            raise answer["is"]
        return str(answer["is"])

    monkeypatch.setattr("secateur.models.fetch.snapshot_download", snapshot_download)
    return calls, answer


def test_a_hub_name(hub, folder):
    calls, answer = hub
    answer["is"] = folder
    decoder = open_model("owner/model", revision="v1.2")
    assert decoder.source == "owner/model"
    assert decoder.folder == folder
    for call in calls:
        assert call["repo_id"] == "owner/model"
        assert call["revision"] == "v1.2"
    before, weights = (call["allow_patterns"] for call in calls)
    assert not any(fnmatch("model.safetensors", pattern) for pattern in before), "weights come last"
    patterns = [*before, *weights]
    for wanted in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
    ):
        assert any(fnmatch(wanted, pattern) for pattern in patterns), wanted
    for unwanted in (
        "pytorch_model.bin",
        "model.pth",
        "model.gguf",
        "flax_model.msgpack",
        "model.onnx",
        "modeling_x.py",
    ):
        assert not any(fnmatch(unwanted, pattern) for pattern in patterns), unwanted


def test_pickled_weights_come_from_the_hub_when_they_are_allowed(hub, folder):
    calls, answer = hub
    answer["is"] = folder
    open_model("owner/model", allow_pickle=True)
    assert any(fnmatch("pytorch_model.bin", pattern) for pattern in calls[1]["allow_patterns"])


def test_only_the_weights_that_an_index_names_come_from_the_hub(hub, tmp_path):
    calls, answer = hub
    answer["is"] = save_tiny("llama", tmp_path / "sharded", max_shard_size="40KB")
    open_model("owner/model")
    names = sorted(path.name for path in answer["is"].glob("model-*.safetensors"))
    assert len(names) > 1
    assert calls[1]["allow_patterns"] == names


def test_no_weights_come_from_the_hub_to_say_what_a_job_needs(hub, folder):
    calls, answer = hub
    answer["is"] = folder
    whole = open_model("owner/model")
    (folder / "model.safetensors").unlink()
    calls.clear()
    shapes = open_shapes("owner/model")
    assert len(calls) == 1
    assert not any(fnmatch("model.safetensors", pattern) for pattern in calls[0]["allow_patterns"])
    assert shapes.fingerprint == ""
    assert not shapes.by_blocks
    assert shapes.parameter_count == whole.parameter_count
    assert memory_of(shapes, 1000) == memory_of(whole, 1000)
    assert inspect_model(shapes)["parameters"] == inspect_model(whole)["parameters"]
    assert open_shapes("owner/model", skeleton=True).by_blocks


def test_no_weights_come_from_the_hub_for_what_is_refused(hub, folder):
    calls, answer = hub
    answer["is"] = folder
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match="quantised"):
        open_model("owner/model")
    assert len(calls) == 1


def test_code_comes_from_the_hub_when_it_is_trusted(hub, folder):
    calls, answer = hub
    answer["is"] = folder
    open_model("owner/model", trust_remote_code=True)
    assert any(fnmatch("modeling_x.py", pattern) for pattern in calls[0]["allow_patterns"])


def test_a_hub_model_that_is_not_there(hub):
    _, answer = hub
    response = SimpleNamespace(headers={}, request=None)
    answer["is"] = RepositoryNotFoundError("404: no such repository\nmore", response=response)
    with pytest.raises(InputError, match="owner/model: not available on the hub"):
        open_model("owner/model")


def test_a_local_folder_comes_before_the_hub(hub, folder, monkeypatch):
    calls, _ = hub
    monkeypatch.chdir(folder.parent.parent)
    source = f"{folder.parent.name}/{folder.name}"
    assert open_model(source).source == f"./{source}", "so that it is not taken for a name on the hub"
    assert not calls


def test_offloaded_weights_are_refused(folder):
    module = AutoModelForCausalLM.from_pretrained(folder)
    module.model.layers[1].to("meta")
    with pytest.raises(InputError, match="offloaded; give the folder instead"):
        open_model(module)


# What is refused


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_model(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model_type": "nobody-knows"}'], ids=["empty", "torn", "list", "no type", "unknown"]
)
def test_a_configuration_that_cannot_be_read(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="configuration"):
        open_model(folder)


@pytest.mark.parametrize(
    "entries",
    [{"hidden_size": "wide"}, {"hidden_size": 33}, {"num_hidden_layers": None}, {"num_hidden_layers": "two"}],
    ids=["text", "indivisible", "default", "blocks"],
)
def test_a_configuration_that_contradicts_itself_or_the_weights(folder, entries):
    edit_config(folder, **entries)
    with pytest.raises(ModelError):
        open_model(folder)


def test_one_width_for_each_block(tmp_path):
    """As Gemma 3n has them."""
    config = {"model_type": "gemma3n_text", "num_hidden_layers": 2, "num_kv_shared_layers": 0}
    for widths in ([48, 48], [48, 0]):
        (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": widths}))
        if all(widths):
            assert read_config(tmp_path, "here", trust_remote_code=False).intermediate_size == widths
        else:
            with pytest.raises(ModelError, match=r"intermediate_size in its config\.json is 0"):
                read_config(tmp_path, "here", trust_remote_code=False)


def test_layer_types_of_another_length(tmp_path):
    folder = save_tiny("gemma2", tmp_path, blocks=4)
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError):
        open_model(folder)


@MODES
def test_encoder(tmp_path, skeleton):
    tiny_encoder().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertForMaskedLM is not a causal language model"):
        open_model(tmp_path, skeleton=skeleton)


def test_encoder_in_memory():
    with pytest.raises(ModelError, match="causal"):
        open_model(tiny_encoder())


@pytest.mark.parametrize("model_type", ["vit", "clip_vision_model", "wav2vec2", "timesformer"])
def test_a_model_that_reads_no_text(folder, model_type):
    config = {"model_type": model_type, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=str(folder)):
        open_model(folder)


@MODES
def test_encoder_decoder(tmp_path, skeleton):
    config = T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        open_model(tmp_path, skeleton=skeleton)


@pytest.mark.parametrize("model_type", ["qwen2_audio", "voxtral"])
def test_multimodal_model_without_images(folder, model_type):
    from transformers import AutoConfig

    AutoConfig.for_model(model_type).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"multimodal model .*text_config"):
        open_model(folder)


@MODES
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "new-one"])
def test_quantised_weights(folder, method, skeleton):
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"quantised .*{method}"):
        open_model(folder, skeleton=skeleton)


def test_quantised_weights_whose_card_names_the_original(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    (folder / "README.md").write_text("---\nbase_model:\n- owner/Original-7B\n---\n# Quantised\n")
    with pytest.raises(ModelError, match="unquantised checkpoint, owner/Original-7B, and quantise the result"):
        open_model(folder)


def test_quantised_weights_of_no_named_method(folder):
    edit_config(folder, quantization_config={"bits": 4})
    with pytest.raises(ModelError, match="quantised"):
        open_model(folder)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_decoder_without_a_language_head(kind, folder):
    module = kind(build("llama", blocks=2).config)
    with pytest.raises(ModelError, match=r"lm_head|no list of blocks|causal"):
        open_model(module)
    module.save_pretrained(folder)
    with pytest.raises(ModelError, match=f"{kind.__name__} is not a causal language model"):
        open_model(folder)


@MODES
def test_no_weights(folder, skeleton):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights here"):
        open_model(folder, skeleton=skeleton)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(folder, name):
    pickle_weights(folder)
    (folder / "pytorch_model.bin").rename(folder / name)
    with pytest.raises(ModelError, match=f"only pickled weights .{name}.*allow_pickle"):
        open_model(folder)


def test_pickled_weights_are_read_when_they_are_allowed(folder):
    expected = use(open_model(folder))
    pickle_weights(folder)
    decoder = open_model(folder, allow_pickle=True)
    assert torch.equal(use(decoder), expected)
    assert decoder.fingerprint == open_model(folder, allow_pickle=True).fingerprint
    assert len(decoder.fingerprint) == 64
    with pytest.raises(InputError, match="skeleton"):
        open_model(folder, allow_pickle=True, skeleton=True)


def test_pickled_weights_beside_an_index_are_not_read_unasked(folder):
    """An index that names safetensors files which are not there must not open the door for the pickle beside it."""
    keys = list(load_file(folder / "model.safetensors"))
    pickle_weights(folder)
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"pickled weights|missing shard"):
        open_model(folder)


def test_safetensors_are_taken_where_both_are_there(folder):
    torch.save({"model.norm.weight": torch.zeros(32)}, folder / "pytorch_model.bin")
    decoder = open_model(folder, allow_pickle=True)
    assert torch.equal(use(decoder), forward(build("llama", blocks=2), draw_tokens(windows=1)))


@MODES
@pytest.mark.parametrize("keep", [0, 5, 200, -100], ids=["empty", "no header", "half a header", "end missing"])
def test_truncated_shard(folder, keep, skeleton):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(ModelError, match=r"model"):
        use(open_model(folder, skeleton=skeleton))


def test_truncated_shard_where_the_configuration_names_no_dtype(folder):
    edit_config(folder, dtype=None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="model"):
        open_model(folder)


@MODES
def test_missing_shard(sharded, skeleton):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"missing shard {gone.name}"):
        open_model(sharded, skeleton=skeleton)


@MODES
@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": []}'])
def test_an_index_that_cannot_be_read(sharded, text, skeleton):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index"):
        open_model(sharded, skeleton=skeleton)


@MODES
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_missing_tensor(folder, name, skeleton):
    edit_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"no weights for {name}"):
        use(open_model(folder, skeleton=skeleton))


@MODES
def test_missing_block(folder, skeleton):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"no weights (of block 2|for model\.layers\.2\.)"):
        use(open_model(folder, skeleton=skeleton))


@MODES
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_tensor_of_another_shape(folder, name, skeleton):
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(7, *tensors[name].shape[1:])}))
    with pytest.raises(ModelError, match=name):
        use(open_model(folder, skeleton=skeleton))


@pytest.mark.parametrize("text", ["", "{", '{"version": 1}'], ids=["empty", "torn", "not a tokenizer"])
def test_a_tokenizer_that_cannot_be_read(folder, text):
    build_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        open_model(folder)


def test_a_tokenizer_that_does_not_exist(folder):
    with pytest.raises((InputError, ModelError), match="tokenizer"):
        open_model(folder, tokenizer="someone/nothing")


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', '{"history": 3}'])
def test_a_record_that_cannot_be_read(folder, text):
    (folder / "secateur.json").write_text(text)
    with pytest.raises(ModelError, match=r"secateur\.json"):
        open_model(folder)


# Code that comes with a checkpoint

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own-decoder"
"""
MODEL = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    config: OwnConfig
"""


@pytest.fixture
def own_code(folder, tmp_path_factory, monkeypatch):
    modules = tmp_path_factory.getbasetemp() / "modules"  # one for all: python remembers the place
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODEL)
    places = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(folder, model_type="own-decoder", architectures=["OwnForCausalLM"], auto_map=places)
    return folder


def test_code_in_a_checkpoint_does_not_run_unasked(own_code):
    (own_code / "configuration_own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match="trust_remote_code"):
        open_model(own_code)


@MODES
def test_code_in_a_checkpoint_runs_when_it_is_trusted(own_code, skeleton):
    decoder = open_model(own_code, trust_remote_code=True, skeleton=skeleton)
    assert type(decoder.module).__name__ == "OwnForCausalLM"
    assert decoder.anatomy.family.detected
    assert torch.equal(use(decoder), forward(build("llama", blocks=2), draw_tokens(windows=1)))


def test_a_model_with_trusted_code_is_saved_with_it_and_reopened(own_code, tmp_path):
    record = save(open_model(own_code, trust_remote_code=True), tmp_path / "copy")
    assert record["check"]["passed"]
    assert (tmp_path / "copy" / "modeling_own.py").is_file()


# Fingerprints


def test_a_copy_has_the_same_fingerprint(sharded, tmp_path):
    copy = shutil.copytree(sharded, tmp_path / "copy")
    (copy / "README.md").write_text("another readme")
    prints = {open_model(place, skeleton=mode).fingerprint for place in (sharded, copy) for mode in (False, True)}
    assert len(prints) == 1


@pytest.mark.parametrize("place", ["start", "end"])
def test_one_other_weight_gives_another_fingerprint(sharded, place):
    before = open_model(sharded).fingerprint
    for path in sharded.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little")
        changed = bytearray(data)
        changed[header if place == "start" else -2] ^= 1
        path.write_bytes(changed)
        assert open_model(sharded).fingerprint != before
        path.write_bytes(data)
    assert open_model(sharded).fingerprint == before


def test_the_ends_of_a_large_shard_are_looked_at(tmp_path):
    """More than two MiB of weights, so that start and end are read apart."""
    from secateur.models.fingerprint import of_folder

    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3 << 20, dtype=torch.uint8)}, path)
    before = of_folder(tmp_path)
    data = path.read_bytes()
    for position in (len(data) - (3 << 20), len(data) - 1):
        changed = bytearray(data)
        changed[position] = 1
        path.write_bytes(changed)
        assert of_folder(tmp_path) != before
    path.write_bytes(data)
    assert of_folder(tmp_path) == before
    save_file({"other": torch.zeros(3 << 20, dtype=torch.uint8)}, path)
    assert of_folder(tmp_path) != before


def test_another_configuration_gives_another_fingerprint(folder):
    before = open_model(folder).fingerprint
    edit_config(folder, rms_norm_eps=1e-5)
    assert open_model(folder).fingerprint != before

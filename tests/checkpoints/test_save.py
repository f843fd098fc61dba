"""A saved folder is complete, proved, and never half-written."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from secateur import make_plan, open_model, prune, save
from secateur.checkpoints import check, fresh_process, writer
from secateur.checkpoints.folders import replacing
from secateur.errors import CheckError, InputError, NumericsError, SecateurWarning
from secateur.surgery.depth.blocks import keep_blocks
from secateur.surgery.depth.merging import merge_windows
from tiny_models import save_tiny

REAL_PROCESS = check._run
"""What starts a process; elsewhere in these tests it is forked from a warm one."""


@pytest.fixture
def source(tmp_path):
    return save_tiny("llama-tied", tmp_path / "source", dtype=torch.bfloat16, tokenizer=True)


@pytest.fixture
def pruned(source):
    (source / "LICENSE").write_text("do as you like")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# original\n")
    model = open_model(source)
    return prune(model, make_plan(model, method="last-n", blocks=3))


def test_a_folder_is_complete_and_proved(pruned, source, tmp_path):
    record = save(pruned, tmp_path / "cut")
    folder = tmp_path / "cut"
    names = {file.name for file in folder.iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "README.md", "secateur.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "LICENSE"}
    assert record["check"]["passed"]
    assert record["check"]["without_secateur"]
    assert record["check"]["stored_dtype"] == "bfloat16"
    assert record["check"]["parameters"] == record["parameters_after"] == pruned.parameter_count
    assert json.loads((folder / "secateur.json").read_text()) == record
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(source).chat_template
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "5, 6, 7" not in card
    assert "4, 5, 6" in card, "last-n keeps the very last block"
    assert "lm_head.weight" not in load_file(folder / "model.safetensors"), "tied weights are stored once"
    assert list(tmp_path.glob(".*")) == [], "no temporary folder is left"


def test_history_is_kept_when_a_result_is_cut_again(pruned, source, tmp_path):
    save(pruned, tmp_path / "once", check=False)
    again = open_model(tmp_path / "once")
    record = save(prune(again, make_plan(again, method="last-n", blocks=1)), tmp_path / "twice", check=False)
    assert [len(entry["plan"]["steps"][0]["blocks"]) for entry in record["history"]] == [3, 1]
    assert record["base_model"] == str(source)
    assert record["parameters_before"] == open_model(source).parameter_count


def test_the_card_names_a_base_model_on_the_hub_and_no_folder_of_this_machine(pruned, source, tmp_path):
    save(pruned, tmp_path / "local", check=False)
    assert "base_model" not in (tmp_path / "local" / "README.md").read_text()
    assert str(source) not in (tmp_path / "local" / "README.md").read_text()
    model = dataclasses.replace(open_model(source), source="them/dense")
    save(prune(model, make_plan(model, method="last-n", blocks=1)), tmp_path / "once", check=False)
    again = open_model(tmp_path / "once")
    save(prune(again, make_plan(again, method="sleb", blocks=0)), tmp_path / "twice", check=False)
    for name in ("once", "twice"):
        data = ModelCard.load(tmp_path / name / "README.md").data.to_dict()
        assert (data["base_model"], data["base_model_relation"], data["license"]) == ("them/dense", "finetune", "mit")
    assert data["tags"] == ["secateur", "pruned", "last-n", "sleb"]


def test_another_dtype_can_be_asked_for(pruned, tmp_path):
    save(pruned, tmp_path / "cut", dtype="float16", check=False)
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["dtype"] == "float16"
    with pytest.raises(InputError, match=r"unknown dtype 'int3'.*bfloat16"):
        save(pruned, tmp_path / "cut", dtype="int3")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_rounded_to_another_dtype_pass_the_check(tiny, tmp_path, dtype):
    decoder = tiny("llama")
    record = save(prune(decoder, make_plan(decoder, method="last-n", blocks=1)), tmp_path / "cut", dtype=dtype)
    assert record["check"]["passed"]
    assert record["check"]["logit_difference"] > 1e-5, "rounding is seen"


def test_weights_that_stay_float32_are_not_rounded(tmp_path):
    """Routing by biases that differ by hundredths of a number near 6 (DeepSeek-V3, GLM-4-MoE)."""
    config = AutoConfig.for_model(
        "glm4_moe",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = 6 + 0.02 * torch.randn(buffer.shape)
    made.save_pretrained(tmp_path / "made")
    kept = "model.layers.1.mlp.gate.e_score_correction_bias"
    expected = load_file(tmp_path / "made" / "model.safetensors")[kept]
    for skeleton in (False, True):
        decoder = open_model(tmp_path / "made", skeleton=skeleton)
        for edit, cut in (
            ("dropped", keep_blocks(decoder, [0, 1])),
            ("merged", merge_windows(decoder, [(1, 2)], "mean")),
        ):
            record = save(cut, tmp_path / f"{edit}-{skeleton}")
            assert record["check"]["passed"]
            assert torch.equal(load_file(tmp_path / f"{edit}-{skeleton}" / "model.safetensors")[kept], expected)


@pytest.mark.parametrize("skeleton", [False, True])
def test_what_the_checkpoint_holds_in_float32_stays_so(tmp_path, skeleton):
    """The routers of HunYuan's mixtures are in float32 in a checkpoint of bfloat16."""
    name = "model.layers.{}.mlp.gate_proj.weight"
    source = save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    stored = load_file(source / "model.safetensors")
    exact = {name.format(block): stored[name.format(block)].float() + 1e-4 for block in range(8)}
    save_file(stored | exact, source / "model.safetensors", {"format": "pt"})
    cut = keep_blocks(open_model(source, dtype="float32", skeleton=skeleton), (0, 1, 2, 5, 6, 7))
    save(cut, tmp_path / "cut", check=False)
    found = load_file(tmp_path / "cut" / "model.safetensors")
    assert torch.equal(found[name.format(3)], exact[name.format(5)])
    assert {one.dtype for key, one in found.items() if "gate_proj" not in key} == {torch.bfloat16}


def test_a_tokenizer_that_was_given_is_the_one_that_is_saved(source, tmp_path):
    other = AutoTokenizer.from_pretrained(source)
    other.add_tokens(["<a token of mine>"])
    decoder = open_model(source, tokenizer=other)
    save(decoder, tmp_path / "with", check=False)
    assert "<a token of mine>" in AutoTokenizer.from_pretrained(tmp_path / "with").get_vocab()
    save(open_model(source), tmp_path / "without", check=False)
    assert "<a token of mine>" not in AutoTokenizer.from_pretrained(tmp_path / "without").get_vocab()


@pytest.mark.parametrize("card", [b"---\nbad: [\n---\n", "caf\xe9".encode("latin-1"), b"---\n- a\n- list\n---\n"])
def test_an_unreadable_card_costs_a_warning_and_no_result(source, tmp_path, card):
    (source / "README.md").write_bytes(card)
    (source / "tokenizer").mkdir()
    with pytest.warns(SecateurWarning, match=r"README.md: not readable .*licence and languages are not taken over"):
        save(open_model(source), tmp_path / "cut", check=False)
    assert (tmp_path / "cut" / "model.safetensors").is_file()


def test_code_that_a_configuration_names_and_nobody_used_is_not_named_again(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "configuration_x.XConfig"}}))
    save(open_model(source), tmp_path / "cut", check=False)
    assert "auto_map" not in json.loads((tmp_path / "cut" / "config.json").read_text())


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(pruned, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "cut")
    for _ in range(2):
        save(pruned, tmp_path / "link", check=False)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "cut" / "model.safetensors").is_file()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "source"]
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["cut"]


def test_what_is_not_ours_is_refused(pruned, source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match="not written by secateur"):
        save(pruned, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "ten years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        save(pruned, tmp_path / "file")
    with pytest.raises(InputError, match="exists and was not written by secateur"):
        save(pruned, source)


def test_a_model_is_never_replaced_while_it_is_read(pruned, tmp_path):
    save(pruned, tmp_path / "cut", check=False)
    again = open_model(tmp_path / "cut")
    with pytest.raises(InputError, match="is the model being read"):
        save(again, tmp_path / "cut")


def test_a_failed_check_keeps_what_was_there(pruned, tmp_path, monkeypatch):
    save(pruned, tmp_path / "cut", check=False)
    before = (tmp_path / "cut" / "secateur.json").read_text()
    honest = writer._converted
    monkeypatch.setattr(writer, "_converted", lambda *given: {k: v * 1.5 for k, v in honest(*given).items()})
    with pytest.raises(CheckError, match="logits differ"):
        save(pruned, tmp_path / "cut")
    assert (tmp_path / "cut" / "secateur.json").read_text() == before
    assert list(tmp_path.glob(".*")) == []


def test_the_check_is_a_process_of_its_own(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_run", REAL_PROCESS)
    checked = save(pruned, tmp_path / "cut")["check"]
    assert checked["passed"]
    assert checked["without_secateur"]


def test_a_folder_that_cannot_be_opened_fails_the_check(tmp_path):
    job = {"folder": str(tmp_path), "expected": "none.npz", "dtype": "float32", "tolerance": 1e-4}
    with pytest.raises(CheckError, match="could not be reopened"):
        check.reopen([job])


def test_a_full_disk_keeps_what_was_there(pruned, tmp_path, monkeypatch):
    save(pruned, tmp_path / "cut", check=False)
    before = (tmp_path / "cut" / "secateur.json").read_text()

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(InputError, match=r"cannot be written .*No space left"):
        save(pruned, tmp_path / "cut")
    assert (tmp_path / "cut" / "secateur.json").read_text() == before
    assert list(tmp_path.glob(".*")) == []


def test_too_little_room_is_said_before_anything_is_written(pruned, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="are free"):
        save(pruned, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_an_interruption_leaves_nothing_half_written(tmp_path):
    def interrupted():
        with replacing(tmp_path / "cut") as part:
            (part / "model.safetensors").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_folders_inside_can_be_entered(tmp_path):
    with replacing(tmp_path / "demo") as part:
        (part / "cut").mkdir()
        (part / "plan.json").touch(0o600)
    assert (tmp_path / "demo" / "cut").stat().st_mode & 0o100
    assert not (tmp_path / "demo" / "plan.json").stat().st_mode & 0o100


def test_nan_weights_are_not_saved(pruned, tmp_path):
    with torch.no_grad():
        pruned.block_list[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        save(pruned, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_the_fresh_process_notices_missing_weights_and_a_broken_cache(pruned, tmp_path, monkeypatch):
    save(pruned, tmp_path / "cut", check=False)
    job = check.record_expected(pruned, tmp_path / "expected.npz").job(tmp_path / "cut")
    assert not fresh_process.examine(job)["passed"], "secateur is imported here, which must fail the check"
    monkeypatch.delitem(fresh_process.sys.modules, "secateur")
    assert fresh_process.examine(job)["passed"]
    monkeypatch.setattr(fresh_process, "_generation_gap", lambda *_: 0.5)
    assert not fresh_process.examine(job)["passed"]
    monkeypatch.undo()
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    writer.save_file(weights, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    assert fresh_process.examine(job)["wrong_keys"] == ["model.layers.2.mlp.up_proj.weight"]


def with_own_head(folder):
    """Store a head in a checkpoint whose configuration ties the head to the embeddings; return its logits' oracle."""
    weights = load_file(folder / "model.safetensors")
    head = torch.randn(weights["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(1))
    weights["lm_head.weight"] = head.to(torch.bfloat16)
    writer.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("skeleton", [False, True])
def test_the_stored_head_is_the_head(source, tmp_path, skeleton):
    dense = AutoModelForCausalLM.from_pretrained(with_own_head(source), dtype=torch.float32).eval()
    model = open_model(source, skeleton=skeleton)
    assert not model.anatomy.tied
    save(prune(model, make_plan(model, method="last-n", blocks=3)), tmp_path / "cut")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32).eval()
    dense.model.layers = torch.nn.ModuleList([dense.model.layers[i] for i in (0, 1, 2, 3, 7)])
    tokens = torch.arange(3, 20)[None]
    torch.testing.assert_close(cut(tokens).logits, dense(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_a_stored_copy_of_the_embeddings_stays_tied(source):
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    writer.save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert all(open_model(source, skeleton=one).anatomy.tied for one in (False, True))


@pytest.mark.parametrize("method", ["last-n", "wanda-sp"])
def test_a_mistake_in_reading_does_not_confirm_itself(source, tmp_path, monkeypatch, method):
    """Were the stored head overlooked, the cut would be like the model that was read, but not like the original."""
    with_own_head(source)
    windows = tmp_path / "windows.npy"
    np.save(windows, np.arange(3, 35).reshape(2, 16))
    monkeypatch.setattr("secateur.models.opening.holds_own_head", lambda *_: False)
    model = open_model(source, skeleton=True)
    amount = {"blocks": 2} if method == "last-n" else {"remove": "10%", "texts": windows}
    with pytest.raises(CheckError, match="not the original"):
        save(prune(model, make_plan(model, method=method, **amount)), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_every_file_travels_but_weights_and_what_is_written_anew(tmp_path):
    folder = save_tiny("llama", tmp_path / "dense", blocks=3, tokenizer=True)
    for name in ("odd_vocabulary.spm", "tokenization_own.py", "video_preprocessor.json", "USE_POLICY.md"):
        (folder / name).write_text("kept")
    for name in ("pytorch_model.bin", "model.onnx", "quantize_config.json", ".hidden"):
        (folder / name).write_text("left behind")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("kept")
    decoder = open_model(folder)
    save(prune(decoder, make_plan(decoder, method="last-n", blocks=1)), tmp_path / "cut", check=False)
    found = {file.relative_to(tmp_path / "cut").as_posix() for file in (tmp_path / "cut").rglob("*") if file.is_file()}
    assert {"odd_vocabulary.spm", "tokenization_own.py", "video_preprocessor.json", "USE_POLICY.md"} <= found
    assert "additional_chat_templates/tools.jinja" in found
    assert not found & {"pytorch_model.bin", "model.onnx", "quantize_config.json", ".hidden"}


def test_blocks_for_multi_token_prediction_are_left_behind_with_a_word(tmp_path):
    folder = save_tiny("deepseek_v3", tmp_path / "dense", blocks=4)
    weights = load_file(folder / "model.safetensors")
    more = {name.replace("layers.3.", "layers.4."): one.clone() for name, one in weights.items() if "layers.3." in name}
    save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})
    decoder = open_model(folder)
    assert decoder.config.num_mtp_layers == 1
    with pytest.warns(SecateurWarning, match="1 blocks for multi-token prediction"):
        save(prune(decoder, make_plan(decoder, method="last-n", blocks=1)), tmp_path / "cut", check=False)
    found = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert found["num_hidden_layers"] == 3
    assert not found.get("num_nextn_predict_layers", found.get("num_mtp_layers"))

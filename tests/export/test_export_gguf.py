"""GGUF files: written from cuts, read back, and run by llama.cpp beside transformers."""

import dataclasses
import json
import stat
import struct
from pathlib import Path

import gguf as package
import pytest
import torch

import secateur
from gguf_cuts import merging_tokenizer, tiny_decoder
from oracles import draw_windows
from secateur.errors import CheckError, InputError, ModelError, NumericsError
from secateur.export import gguf, llama_cpp
from secateur.export.gguf import GgufOptions, export_gguf
from secateur.export.gguf_contents import metadata
from secateur.export.gguf_file import PROVENANCE, GgufFile
from secateur.export.gguf_header import read_header
from secateur.export.gguf_layout import LAYOUTS
from secateur.methods.method import Measurements, apply_step
from secateur.models.opening import open_model
from secateur.plan.steps import PruneWidth
from secateur.surgery.uneven import as_decilm
from secateur.surgery.width.target import dense_widths, width_sizes
from tiny_models import FAMILIES

VARIATIONS = ("llama-tied", "llama-bias", "gpt_neox-sequential", "stablelm-parallel", "falcon-new")
UNCHECKED = GgufOptions(check=False)


@pytest.fixture(scope="module")
def bundled():
    return open_model("bundled", dtype="float32")


def cut(model, method, **amount):
    plan = secateur.make_plan(model, method=method, texts="python-stdlib", windows=2, seq_len=64, **amount)
    return secateur.prune(model, plan)


# The same numbers in llama.cpp


@pytest.mark.parametrize("name", [*(name for name in FAMILIES if name in LAYOUTS and name != "smollm3"), *VARIATIONS])
def test_every_family_computes_the_same_in_llama_cpp(name, tmp_path):
    """Seven blocks: no period that llama.cpp assumes for sliding windows fits them."""
    done = export_gguf(tiny_decoder(name, tmp_path / "model", blocks=7), tmp_path / "model.gguf")
    assert done.proof.difference < 1e-4
    assert done.proof.greedy[0] == done.proof.greedy[1]
    assert done.proof.same_tokens
    assert done.file.is_file()


def without_blocks(model, *numbers):
    plan = secateur.make_plan(model, method="last-n", blocks=len(numbers))
    (step,) = plan.steps
    return secateur.prune(model, plan.model_copy(update={"steps": (step.model_copy(update={"blocks": numbers}),)}))


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_the_proof_is_longer_than_the_window_and_notices_a_lost_pattern(name, tmp_path, monkeypatch):
    decoder = without_blocks(tiny_decoder(name, tmp_path / "model", blocks=7), 1, 4)
    right = export_gguf(decoder, tmp_path / "right.gguf").proof
    assert right.window_crossed
    assert right.difference < 1e-4

    def without_pattern(decoder, layout):
        return {key: one for key, one in metadata(decoder, layout).items() if not key.endswith("window_pattern")}

    monkeypatch.setattr(gguf, "metadata", without_pattern)
    with pytest.raises(CheckError, match="computes something else than the model; nothing was kept"):
        export_gguf(decoder, tmp_path / "wrong.gguf")
    assert not (tmp_path / "wrong.gguf").exists()


def test_a_gemma_with_as_many_blocks_as_the_largest_has_its_own_attention_scale(tmp_path):
    decoder = tiny_decoder("gemma2", tmp_path / "model", blocks=46)
    assert export_gguf(decoder, tmp_path / "model.gguf").proof.difference < 1e-4


@pytest.mark.parametrize(
    ("method", "amount", "architecture"),
    [
        ("last-n", {"blocks": 3}, "llama"),
        ("minitron-width", {"remove": 0.2}, "llama"),
        ("stock-slicing", {"remove": 0.2}, "llama"),
        ("flap", {"remove": 0.2}, "deci"),
    ],
)
def test_cuts_of_the_bundled_model(bundled, method, amount, architecture, tmp_path):
    pruned = cut(bundled, method, **amount)
    done = export_gguf(pruned, tmp_path / "cut.gguf", GgufOptions(kind="f16"))
    assert done.architecture == architecture
    assert done.proof.difference < 1e-3
    header = read_header(done.file).entries
    assert header["general.name"].value == f"bundled {method}"
    provenance = json.loads(header[PROVENANCE].value)
    assert provenance["methods"] == [method]
    assert provenance["parameters_after"] == pruned.parameter_count
    if method == "flap":
        channels = header["deci.feed_forward_length"].value
        assert len(channels) == 12
        assert len(set(channels)) > 1


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_types_of_matrices(bundled, kind, tmp_path):
    done = export_gguf(bundled, tmp_path / "model.gguf", GgufOptions(kind=kind))
    reader = package.GGUFReader(done.file)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.3.ffn_up.weight"] == kind.upper()
    assert types["blk.3.ffn_norm.weight"] == "F32"
    up = next(one for one in reader.tensors if one.name == "blk.3.ffn_up.weight")
    expected = bundled.block_list[3].mlp.up_proj.weight
    found = torch.tensor(package.quants.dequantize(up.data, up.tensor_type))
    assert (found - expected).abs().max() <= {"f32": 0, "bf16": 0, "q8_0": 1e-2}[kind] * expected.abs().max()


def test_rows_that_q8_0_cannot_hold_stay_in_float16(tmp_path):
    decoder = tiny_decoder("llama", tmp_path / "model")  # 48 channels
    done = export_gguf(decoder, tmp_path / "model.gguf", GgufOptions(kind="q8_0", check=False))
    kinds = {one.name: one.tensor_type.name for one in package.GGUFReader(done.file).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_llama_3_positions_and_fewer_heads_of_a_qwen2(tmp_path):
    scaled = tiny_decoder("llama", tmp_path / "llama")
    rope = {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    config = json.loads((tmp_path / "llama/config.json").read_text())
    (tmp_path / "llama/config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    scaled = dataclasses.replace(open_model(tmp_path / "llama", dtype="float32"), tokenizer=merging_tokenizer())
    done = export_gguf(scaled, tmp_path / "llama.gguf")
    assert done.proof.difference < 1e-4
    assert "rope_freqs.weight" in read_header(done.file).tensors

    qwen = tiny_decoder("qwen2", tmp_path / "qwen")
    fewer = cut(qwen, "minitron-width", remove=0.3, settings={"heads": "even"})
    done = export_gguf(fewer, tmp_path / "qwen.gguf")
    assert done.architecture == "llama"
    assert done.proof.difference < 1e-4


def test_a_skeleton_gives_the_same_file(tmp_path):
    whole = tiny_decoder("qwen3", tmp_path / "model")
    thin = tiny_decoder("qwen3", tmp_path / "model", skeleton=True)
    files = [export_gguf(one, tmp_path / f"{number}.gguf", UNCHECKED).file for number, one in enumerate((whole, thin))]
    assert files[0].read_bytes() == files[1].read_bytes()


# What else is in the file


def test_tokenizer_and_description_of_the_dense_file(tmp_path):
    dense = tiny_decoder("llama", tmp_path / "model")
    written = export_gguf(dense, tmp_path / "dense.gguf", UNCHECKED).file
    entries = read_header(written).entries
    assert entries["tokenizer.ggml.pre"].value == "gpt-2"
    assert entries["tokenizer.ggml.merges"].value == ["t h", "i n"]
    pruned = dataclasses.replace(cut(dense, "last-n", blocks=1), tokenizer=None)
    with pytest.raises(InputError, match=r"has no tokenizer\. Name a GGUF of the dense model"):
        export_gguf(pruned, tmp_path / "cut.gguf")
    done = export_gguf(pruned, tmp_path / "cut.gguf", GgufOptions(like=written))
    assert done.vocabulary == f"from {written}"
    assert done.proof.same_tokens is None
    assert read_header(done.file).entries["tokenizer.ggml.tokens"] == entries["tokenizer.ggml.tokens"]


def test_a_cut_of_a_gguf_takes_its_tokenizer_and_licence(tmp_path):
    from gguf_files import small_llama, small_tokenizer, write_gguf

    tokenizer = small_tokenizer()
    file = write_gguf(tmp_path / "dense.gguf", small_llama(len(tokenizer)), tokenizer, "F32")
    decoder = open_model(file, dtype="float32")
    secateur.save(cut(decoder, "last-n", blocks=1), tmp_path / "cut", check=False)
    done = export_gguf(open_model(tmp_path / "cut", dtype="float32"), tmp_path / "cut.gguf")
    assert done.vocabulary == f"from {file}"
    assert read_header(done.file).entries["general.license"].value == "apache-2.0"
    assert done.proof.difference < 1e-4
    assert done.proof.same_tokens


def test_chat_template_and_modelfile(tmp_path):
    decoder = tiny_decoder("llama", tmp_path / "model")
    decoder.tokenizer.chat_template = "{{ messages }}"
    done = export_gguf(decoder, tmp_path / "model.gguf", GgufOptions(check=False, modelfile=True))
    assert read_header(done.file).entries["tokenizer.chat_template"].value == "{{ messages }}"
    assert (tmp_path / "Modelfile").read_text() == "FROM ./model.gguf\nPARAMETER num_ctx 64\n"


def test_the_header_is_that_of_the_package(tmp_path):
    file = export_gguf(tiny_decoder("gemma3_text", tmp_path / "model"), tmp_path / "model.gguf", UNCHECKED).file
    header, reader = read_header(file), package.GGUFReader(file)
    fields = {name: one.contents() for name, one in reader.fields.items() if not name.startswith("GGUF.")}
    assert {name: entry.value for name, entry in header.entries.items()} == fields
    assert {one.name: (one.data_offset, one.n_bytes) for one in reader.tensors} == {
        name: (place.begin, place.bytes) for name, place in header.tensors.items()
    }


# llama.cpp's own tools, stood in for


CONVERTER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from gguf import GGUFWriter
assert sys.argv[4] == "--vocab-only"
writer = GGUFWriter(sys.argv[3], "llama")
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("default")
writer.add_token_list([f"token {{number}}" for number in range({count})])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()
"""


def test_the_tokenizer_that_the_converter_writes(tmp_path):
    decoder = tiny_decoder("llama", tmp_path / "model")
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER.format(tests=str(Path(__file__).parents[1]), count=256))
    done = export_gguf(decoder, tmp_path / "model.gguf", GgufOptions(llama_cpp=tmp_path, check=False))
    assert read_header(done.file).entries["tokenizer.ggml.tokens"].value[7] == "token 7"
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such pre-tokenizer')")
    with pytest.raises(InputError, match=r"could not convert the tokenizer of .*\n.*no such pre-tokenizer"):
        export_gguf(decoder, tmp_path / "model.gguf", GgufOptions(llama_cpp=tmp_path, check=False))
    (tmp_path / "convert_hf_to_gguf.py").write_text("import no_such_package")
    with pytest.raises(InputError, match=r"No module named 'no_such_package'\npip install it"):
        export_gguf(decoder, tmp_path / "model.gguf", GgufOptions(llama_cpp=tmp_path, check=False))


def test_the_quantiser_makes_other_types(bundled, tmp_path):
    with pytest.raises(InputError, match=r"neither on the PATH nor below --llama-cpp DIR"):
        export_gguf(bundled, tmp_path / "model.gguf", GgufOptions(kind="q4_k_m", llama_cpp=tmp_path))
    program = tmp_path / "build/bin/llama-quantize"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] || { echo "invalid ftype" >&2; exit 1; }\ncp "$1" "$2"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    done = export_gguf(bundled, tmp_path / "model.gguf", GgufOptions(kind="q4_k_m", llama_cpp=tmp_path, check=False))
    assert (done.kind, done.proof) == ("q4_k_m", None)
    with pytest.raises(InputError, match=r"could not make q9:\ninvalid ftype"):
        export_gguf(bundled, tmp_path / "other.gguf", GgufOptions(kind="q9", llama_cpp=tmp_path))
    assert not (tmp_path / "other.gguf").exists()


# What is refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("opt", "only llama, .* are written, not 'opt'"),
        ("smollm3", r"leaves out rotary positions in every fourth block, and pruning moved those blocks \(1, 4\)"),
        ("qwen3_moe-mixed", "some of its blocks have no experts"),
        ("falcon-rw", "only Falcons with parallel branches and rotary positions"),
        ("gpt2-scaled", "scales the attention of every block alike"),
        ("secateur", "its positions are learned"),
    ],
)
def test_what_llama_cpp_cannot_run(name, reason, tmp_path):
    with pytest.raises(ModelError, match=f"llama.cpp cannot run this model: .*{reason}"):
        export_gguf(tiny_decoder(name, tmp_path / "model", blocks=6), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_fewer_heads_and_an_own_head_where_llama_cpp_has_no_place_for_them(tmp_path):
    phi = cut(tiny_decoder("phi3", tmp_path / "phi"), "minitron-width", remove=0.3, settings={"heads": "even"})
    with pytest.raises(ModelError, match="'phi3' needs as many query dimensions as hidden ones"):
        export_gguf(phi, tmp_path / "model.gguf")
    gemma = tiny_decoder("gemma", tmp_path / "gemma")
    gemma = dataclasses.replace(gemma, anatomy=dataclasses.replace(gemma.anatomy, tied=False))
    with pytest.raises(ModelError, match="always uses the embeddings as head"):
        export_gguf(gemma, tmp_path / "model.gguf")


def test_a_rotated_stream(bundled, tmp_path):
    sliced = cut(bundled, "slicegpt", remove=0.2)
    with pytest.raises(ModelError, match="its residual stream changes its width or basis"):
        export_gguf(sliced, tmp_path / "model.gguf")


def test_targets_and_files_that_are_something_else(bundled, tmp_path):
    (tmp_path / "text.gguf").write_text("mine")
    with pytest.raises(InputError, match="exists and was not written by secateur"):
        export_gguf(bundled, tmp_path / "text.gguf")
    with pytest.raises(InputError, match=r"is a folder; name a file, such as .*model\.gguf"):
        export_gguf(bundled, tmp_path)
    with pytest.raises(ModelError, match="not a GGUF file"):
        export_gguf(bundled, tmp_path / "model.gguf", GgufOptions(like=tmp_path / "text.gguf"))
    with pytest.raises(InputError, match="no such file"):
        export_gguf(bundled, tmp_path / "model.gguf", GgufOptions(like=tmp_path / "none.gguf"))
    other = export_gguf(tiny_decoder("llama", tmp_path / "model"), tmp_path / "other.gguf", UNCHECKED).file
    with pytest.raises(InputError, match="has 256 tokens, the model 4,096 embeddings"):
        export_gguf(bundled, tmp_path / "model.gguf", GgufOptions(like=other))
    assert export_gguf(bundled, other, UNCHECKED).file == other  # one that secateur wrote is replaced


def test_tokenizers_that_llama_cpp_cannot_name(tmp_path):
    decoder = tiny_decoder("llama", tmp_path / "model")
    backend = decoder.tokenizer.backend_tokenizer
    from tokenizers import pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])
    with pytest.raises(InputError, match="no name for the way its tokenizer splits text"):
        export_gguf(decoder, tmp_path / "model.gguf")


def test_damaged_weights_and_damaged_files(tmp_path, monkeypatch):
    decoder = tiny_decoder("llama", tmp_path / "model")
    read_back = GgufFile.read_back

    def damaged(self):
        with self._path.open("r+b") as stream:
            stream.seek(-64, 2)
            stream.write(b"\xff" * 8)
        read_back(self)

    monkeypatch.setattr(GgufFile, "read_back", damaged)
    with pytest.raises(CheckError, match="read back differently"):
        export_gguf(decoder, tmp_path / "model.gguf")
    decoder.module.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(NumericsError, match=r"blk\.1\.ffn_up\.weight: .*or f16 too small"):
        export_gguf(decoder, tmp_path / "model.gguf", GgufOptions(kind="f16"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("damage", [slice(0, 40), slice(0, 4000), slice(0, -100)])
def test_headers_that_end_early(damage, tmp_path):
    whole = export_gguf(tiny_decoder("llama", tmp_path / "model"), tmp_path / "model.gguf", UNCHECKED).file.read_bytes()
    file = tmp_path / "part.gguf"
    file.write_bytes(whole[damage])
    with pytest.raises(ModelError, match="truncated or damaged"):
        read_header(file)
    file.write_bytes(whole[:4] + struct.pack("<I", 9) + whole[8:])
    with pytest.raises(ModelError, match="version 9"):
        read_header(file)


# The command


def test_without_a_binding_the_command_says_that_nothing_is_proved(tmp_path, monkeypatch):
    assert llama_cpp.is_installed()
    monkeypatch.setattr(gguf, "is_installed", lambda: False)
    assert export_gguf(tiny_decoder("llama", tmp_path / "model"), tmp_path / "model.gguf").proof is None


def test_the_command(tmp_path, warm_python):
    def run(*arguments):
        return warm_python.run("-m", "secateur", "export", "bundled", *arguments, folder=tmp_path)

    done = run("--to", "gguf", "-o", "small.gguf", "--modelfile", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["architecture"], record["kind"], record["tensors"]) == ("llama", "bf16", 110)
    assert record["proof"]["nll"] == pytest.approx(record["proof"]["nll_transformers"], rel=5e-3)
    assert "ollama create small -f" in done.stderr
    refused = run("--to", "onnx")
    assert refused.returncode == 2
    assert "unknown format 'onnx'" in refused.stderr


@pytest.mark.parametrize("layout", ["decilm", "folded"])
def test_blocks_that_lack_attention_or_an_mlp(layout, tmp_path):
    """llama.cpp leaves out the attention, too, of a block without an MLP: one that writes nothing stands there."""
    decoder = tiny_decoder("llama", tmp_path / "model")
    widths = list(dense_widths(decoder))
    widths[1] = widths[1].model_copy(update={"channels": 0})
    widths[2] = widths[2].model_copy(update={"groups": 0})
    sizes = width_sizes(decoder, stock=False)
    step = PruneWidth(method="-", widths=tuple(widths), choose="magnitude", stock=False, repair=False, sizes=sizes)
    pruned = apply_step(Measurements(decoder, draw_windows()), step).decoder
    done = export_gguf(as_decilm(pruned) if layout == "decilm" else pruned, tmp_path / "cut.gguf")
    assert done.architecture == "deci"
    assert done.proof.difference < 1e-4
    assert done.proof.same_tokens

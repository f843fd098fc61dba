"""Every causal decoder of the installed transformers × kinds of methods: what works, what is refused, what is wrong.

Each family gets a random model in the shape of its default configuration, made small. Every method cuts it; the result
is saved and opened by plain transformers, and its logits are compared: after a removal of blocks with those of the
original, opened by plain transformers, whose blocks are bypassed; after any other cut with those of the cut in memory.
The default configuration itself, in full size, must be opened too (its shapes, not its weights).

Results go to `results/families.json`, a family at a time; families that are there already are skipped.

    python benchmarks/families.py [--again] [--methods open,shortgpt,obs-width] [family …]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from secateur import make_plan, open_model, prune, save
from secateur.data.windows import Windows
from secateur.errors import ModelError, SecateurError
from secateur.methods.method import METHODS as methods_known
from secateur.models.anatomy import find, resolve
from secateur.models.decoder import Decoder
from secateur.models.detection import detect
from secateur.models.experts import mixture_of
from secateur.models.families import FAMILIES
from secateur.models.shrinking import divisors, shrunken
from secateur.models.widths import block_widths
from secateur.ownership import scratch

FILE = RESULTS / "families.json"
LIMIT = 900
LARGEST = 100_000_000
BLOCKS, VOCABULARY = 6, 128
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shortgpt": ({"blocks": 1}, {}),
    "sleb": ({"blocks": 1}, {}),
    "swm": ({"blocks": 1}, {"across_types": True}),
    "streamline": ({"blocks": 1}, {"network": "none"}),
    "replaceme": ({"blocks": 1}, {}),
    "obs-width": ({}, {"ratio": 0.4, "heads": "never"}),
    "heads": ({}, {}),
    "reap": ({}, {}),
    "slicegpt": ({"slice": 0.25}, {}),
    "stock-slicing": ({"slice": 0.25}, {}),
}
"""Methods with amount and settings: `heads` is `obs-width` with half of the heads; `reap` keeps as few as it can."""
DROPS = ("shortgpt", "sleb", "streamline")
"""Methods that remove blocks and change nothing else."""

ENCODERS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "git",
    "megatron-bert",
    "rembert",
    "roberta",
    "reformer",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "trocr",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlnet",
    "xmod",
]
"""Encoders with a head that predicts tokens, decoders of encoder-decoders, and Reformer, which needs whole chunks."""

HYBRID = (["linear_attention"] * 3 + ["full_attention"]) * 2
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 3}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SHARED = ["linear_attention", "hybrid"] * 4
GIVEN: dict[str, dict[str, Any]] = {
    "arcee": {"num_attention_heads": 20},
    "bamba": {"attn_layer_indices": [1, 4]},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 2},
    "cohere_compass_text": ALTERNATING | {"rope_parameters": dict.fromkeys(set(ALTERNATING["layer_types"]), ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 500000.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "topk_method": "greedy", "n_routed_experts": 64, "q_lora_rank": None},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
              "num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
    "gpt_neo": {"num_layers": BLOCKS, "attention_types": [[["global", "local"], BLOCKS // 2]]},
    "falcon": {"num_attention_heads": 64, "hidden_size": 4096},
    "gemma3n_text": ALTERNATING | {"num_kv_shared_layers": 2},
    "gemma4_text": ALTERNATING | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "gpt_neox": {"hidden_size": 4096, "num_attention_heads": 32},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "zamba": {"layers_block_type": SHARED, "num_hidden_layers": 8},
    "zamba2": {"layers_block_type": SHARED, "num_hidden_layers": 8},
    "nemotron_h": {"layer_types": ["linear_attention", "mlp", "linear_attention", "moe", "full_attention", "mlp"] * 2},
    "qwen4_exp_text": {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
                       "indexer_compress_ratio": 4},
}  # fmt: skip
"""Settings that a default configuration lacks or gets wrong, so that transformers itself cannot build or run it."""


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    quiet()
    list(methods_known)  # imports them, once for all families
    found = json.loads(FILE.read_text()) if FILE.is_file() else {}
    names = given.families or decoders()
    for name in names:
        wanted = [one for one in given.methods.split(",") if given.again or one not in found.get(name, {})]
        refused = "open" in found.get(name, {}) and found[name]["open"] != "ok"
        if (refused or not wanted) and not given.again:
            continue
        result = limited(name, wanted, default=given.again or "default" not in found.get(name, {}))
        found[name] = {**found.get(name, {}), **result}
        FILE.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
        print(name, json.dumps(result), flush=True)


def decoders() -> list[str]:
    """List the model types of plain causal decoders."""
    names = []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if name in ENCODERS:
            continue
        try:
            config = config_of(name)
        except Exception as error:  # noqa: BLE001 - a default configuration may be anything
            print(name, "has no default configuration:", error)
            continue
        if config.get_text_config(decoder=True) is config and not config.is_encoder_decoder:
            names.append(name)
    return names


def config_of(name: str, blocks: int | None = None) -> Any:
    """Return the default configuration of a family, with this number of blocks unless it lists them."""
    given = GIVEN.get(name, {})
    blocks = len(given["layer_types"]) if "layer_types" in given else blocks
    counted = {} if blocks is None or "num_layers" in given else {"num_hidden_layers": blocks}
    return AutoConfig.for_model(name, **(counted | given))


def quiet() -> None:
    """Silence warnings and progress bars."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def limited(name: str, methods: list[str], *, default: bool) -> dict[str, Any]:
    """Run one family in a process of its own, within the time limit."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(one_family(name, methods, default=default)))
    process.start()
    there.close()
    try:
        if here.poll(LIMIT):
            return dict(here.recv())
        return {"open": f"crash: no answer in {LIMIT} s"}
    except EOFError:
        return {"open": "crash: the process ended"}
    finally:
        process.kill()
        process.join()


def one_family(name: str, methods: list[str], *, default: bool) -> dict[str, Any]:
    """Cut a small model of a family by each method; on request also open its default configuration."""
    with scratch("families") as place:
        result: dict[str, Any] = {}
        if default:
            start = time.perf_counter()
            result["default"] = tried(lambda: default_opens(name))
            result["default_seconds"] = round(time.perf_counter() - start, 1)
        try:
            build(name, place / "dense")
        except Exception as error:  # noqa: BLE001
            known = result.get("default", "")
            refused = known if known.startswith("refused") else None
            return {**result, "open": refused or f"crash: no small model ({type(error).__name__}: {str(error)[:200]})"}
        kind: dict[str, Any] = {}
        result["open"] = tried(lambda: opens(place / "dense", kind))
        result |= kind
        if result["open"] == "ok":
            for method in methods:
                result[method] = tried(partial(cut, method, place / "dense", place / method))
        return {key: one.replace(f"{place}/", "") if isinstance(one, str) else one for key, one in result.items()}


def tried(run: Any) -> str:
    """Return `ok`, or `refused`, `wrong` or `crash` with the message."""
    try:
        run()
    except SecateurError as error:
        return f"refused: {str(error)[:400]}"
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:  # noqa: BLE001 - the point is to see it
        return f"crash: {type(error).__name__}: {str(error)[:300]}"
    return "ok"


def default_opens(name: str) -> None:
    """Match the row of the family, or detect it, with the default configuration in full size."""
    config = config_of(name)
    if name not in FAMILIES:
        detect(config, name)
        return
    with torch.device("meta"):
        resolve(AutoModelForCausalLM.from_config(config), FAMILIES[name])


def build(name: str, folder: Path) -> None:
    """Save a small random model in the shape of the default configuration, each weight drawn so that it matters."""
    config = config_of(name, BLOCKS)
    for divisor in divisors(config):
        try:
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(shrunken(config, divisor)).num_parameters()
            assert size < LARGEST, f"the smallest copy has {size:,} parameters"
            module = AutoModelForCausalLM.from_config(shrunken(config, divisor), dtype=torch.float32).eval()
            redraw(module)
            with torch.no_grad():
                assert torch.isfinite(module(input_ids=TOKENS, use_cache=False).logits).all()
        except Exception:
            if divisor == 1:
                raise
            continue
        module.save_pretrained(folder)
        return


TOKENS = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def redraw(module: nn.Module) -> None:
    """Draw matrices anew, so that each block changes the logits."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)


def opens(folder: Path, kind: dict[str, Any]) -> None:
    """Open the model, and note whether its family has a row."""
    family = open_model(folder).anatomy.family
    kind["row"] = not family.detected


@torch.no_grad()
def cut(method: str, dense: Path, out: Path) -> None:
    """Cut by one method, save, open with plain transformers, and compare."""
    amount, settings = METHODS[method]
    decoder, windows = open_model(dense), Windows.of(TOKENS)
    if method == "heads":
        settings = half_of_the_heads(decoder)
    if method == "reap":
        settings = {"experts": fewest_experts(decoder)}
    name = "obs-width" if method == "heads" else method
    plan = make_plan(decoder, method=name, **amount, texts=windows, settings=settings)
    if method == "stock-slicing" and not all(getattr(step, "stock", False) for step in plan.steps):
        raise ModelError("no stock model can hold its sliced states; the modelling file can")
    pruned = prune(decoder, plan, texts=windows)
    assert pruned.parameter_count < decoder.parameter_count, "nothing was removed"
    save(pruned, out, check=False)
    again, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True, trust_remote_code=method == "slicegpt"
    )
    assert not {*report["missing_keys"], *report["unexpected_keys"]}, f"weights are missing or left over: {report}"
    found = again.eval()(input_ids=TOKENS, use_cache=False).logits
    if method in DROPS:
        original = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
        blocks = find(original, decoder.anatomy.family.blocks)
        for index in set(range(decoder.block_count)) - set(plan.kept_blocks()):
            blocks[index].register_forward_hook(bypass, with_kwargs=True)
        expected = original(input_ids=TOKENS, use_cache=False).logits
    else:
        expected = pruned.module.eval()(input_ids=TOKENS, use_cache=False).logits
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference < 1e-4, f"logits differ by {difference:.1e} of the largest"


def half_of_the_heads(decoder: Decoder) -> dict[str, Any]:
    """Return settings that keep half of the key/value groups, or of the query heads where there is one group."""
    widths = (block_widths(decoder, index) for index in range(decoder.block_count))
    one = next((one for one in widths if one.groups), None)
    if one is None:
        raise ModelError("its heads are not known")
    return {"groups": one.groups // 2} if one.groups > 1 else {"queries": one.queries // 2}


def fewest_experts(decoder: Decoder) -> int:
    """Return the smallest number of experts that the routers of a small model allow."""
    mixture = mixture_of(decoder)
    if mixture.fewest() == mixture.count:
        raise ModelError(f"none of {mixture.count} experts in {mixture.groups} groups can go in a small model")
    return mixture.fewest()


def bypass(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return what entered a block in place of what it computed."""
    entered: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return (entered, *output[1:]) if isinstance(output, tuple | list) else entered


if __name__ == "__main__":
    main()

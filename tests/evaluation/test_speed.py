"""Speed and memory: what is reported, and that it belongs to the right model. No claim about seconds is tested here."""

import pytest
import torch

from secateur import bench, make_plan, open_model, prune
from secateur.errors import InputError
from secateur.evaluation.speed import Timing
from secateur.evaluation.timing import Request, answer, peak_memory, time_blocks
from secateur.models.widths import cache_numbers, cache_size
from tiny_models import FAMILIES, VARIANTS, VOCABULARY, build

EVERY = {
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "time_to_first_token",
    "peak_resident_bytes",
    "cache_bytes_per_token",
    "checkpoint_bytes",
    "parameters",
}


@pytest.mark.parametrize("name", [*FAMILIES, *(one for one in VARIANTS if "sliding" in one), "falcon-new", "olmo3"])
def test_every_family_answers_and_its_cache_is_known_from_shapes(name):
    decoder = open_model(build(name, blocks=3))
    lap = answer(decoder.module, Request(2, 6, 3).tokens(decoder), 3)
    assert lap.cache_bytes == 2 * 6 * 4 * sum(cache_numbers(decoder))
    assert min(lap.prefill, lap.decode) > 0
    assert lap.first >= lap.prefill
    spans = [8 if kind == "sliding_attention" else 12 for kind in getattr(decoder.config, "layer_types", None) or ()]
    if spans:
        assert cache_size(decoder, 12) == tuple(map(int.__mul__, cache_numbers(decoder), spans))


def test_two_models_in_turn(tiny):
    dense = tiny("llama")
    cut = prune(dense, make_plan(dense, method="last-n", blocks=4))
    results = bench(cut, against=dense, timing=Timing(batch_sizes=[1, 2], prompts=[8], new_tokens=3, repeats=3))
    assert {one.measure for one in results} == EVERY
    assert len(results) == 2 * (2 * 4 + 3)
    found = {(one.role, one.measure, one.settings.get("batch")): one for one in results}
    for measure, value in (("cache_bytes_per_token", 4 * 4 * 32), ("parameters", cut.parameter_count)):
        assert found["model", measure, None].value == value
    assert found["model", "cache_bytes_per_token", None].ratio == 0.5
    assert found["model", "checkpoint_bytes", None].value == 4 * cut.parameter_count
    for batch in (1, 2):
        one = found["model", "decode_tokens_per_second", batch]
        assert one.ratio is not None
        assert one.spread["low"] <= one.value <= one.spread["high"]
        assert one.settings["repeats"] == 3
        weights = sum(p.numel() * 4 for p in cut.module.parameters())
        assert found["model", "peak_resident_bytes", batch].value >= weights
    for (role, _, _), one in found.items():
        assert role != "against" or one.ratio == 1


def test_a_sliced_model_and_a_skeleton(tiny):
    for name in ("secateur", "qwen3_moe-mixed"):
        skeleton = tiny(name, skeleton=True)
        results = bench(skeleton, timing=Timing(batch_sizes=[1], new_tokens=2, repeats=1, warmup=0))
        assert {one.measure for one in results} == EVERY
        assert all(one.ratio is None and one.value > 0 for one in results)
        assert all(parameter.is_meta for parameter in skeleton.module.parameters())


def test_time_in_blocks_adds_up(tiny):
    decoder = tiny("llama")
    hooks = [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in decoder.block_list]
    times = time_blocks(decoder, Request(1, 8, 3), kinds=[0, 1] * 4, repeats=3)
    assert len(set(times.blocks)) == 2
    assert times.blocks[0::2] == (times.blocks[0],) * 4
    assert min(times.blocks) > 0
    assert times.whole == pytest.approx(sum(times.blocks) + times.other)
    assert [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in decoder.block_list] == hooks


def test_the_writing_is_that_of_generate(bundled):
    """The cache is handed on rightly: the same greedy tokens as `generate` gives."""
    tokens = Request(2, 12, 6).tokens(bundled)
    seen = []
    handle = bundled.module.register_forward_hook(lambda _m, _a, output: seen.append(output.logits[:, -1].argmax(-1)))
    try:
        answer(bundled.module, tokens, 6)
    finally:
        handle.remove()
    expected = bundled.module.generate(
        tokens, do_sample=False, min_new_tokens=6, max_new_tokens=6, eos_token_id=VOCABULARY * 1000, pad_token_id=0
    )
    assert torch.equal(torch.stack(seen, 1), expected[:, 12:])


def hold_128_mib_for_a_while():
    held = torch.ones(32 << 20)
    for _ in range(30):  # long enough to be looked at, on a busy machine too
        held.add_(1)


def test_peak_memory_sees_what_the_work_takes(tiny):
    module = tiny("llama").module
    idle = peak_memory(module, lambda: None)["peak_resident_bytes"]
    busy = peak_memory(module, hold_128_mib_for_a_while)["peak_resident_bytes"]
    assert busy - idle > 100 << 20


def test_what_cannot_be_measured(tiny):
    decoder = tiny("llama")
    for given, message in (
        ({"prompts": [60], "new_tokens": 8}, "more than the 64 positions"),
        ({"prompts": [0]}, "at least 1"),
        ({"new_tokens": 1}, "new tokens at least 2"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"batch_sizes": []}, "no batch size"),
    ):
        with pytest.raises(InputError, match=message):
            bench(decoder, timing=Timing(**given))

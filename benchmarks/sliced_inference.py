"""How fast sliced models run beside the dense one: reading a prompt, and writing token by token with the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import compare, interleaved, keep, random_llama, random_windows

import secateur
from secateur.models.decoder import Decoder


def reading(model: Decoder, prompt: torch.Tensor) -> Callable[[], object]:
    """Run a prompt through the model."""
    return torch.no_grad()(lambda: model.module(prompt, use_cache=False, logits_to_keep=1))


def writing(model: Decoder, prompt: torch.Tensor, tokens: int) -> Callable[[], object]:
    """Write so many tokens after a short prompt, greedily, with the cache."""
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    return lambda: model.module.generate(prompt[:, :16], do_sample=False, pad_token_id=0, **length)


def main(length: int = 512, tokens: int = 32, rounds: int = 7) -> None:
    """Time `slicegpt` and `stock-slicing` at 25 % of the directions beside the dense model, one prompt at a time."""
    dense = random_llama()
    calibration = random_windows(4, 256)
    prompt = random_windows(1, length).tokens
    for method in ("slicegpt", "stock-slicing"):
        plan = secateur.make_plan(dense, method=method, texts=calibration, slicing=0.25)
        sliced = secateur.prune(dense, plan, texts=calibration)
        setting = {"method": method, "slice": 0.25, "removed": round(plan.removed_fraction, 3), "rounds": rounds}
        for what, how in (("reading", reading), ("writing", lambda model, text: writing(model, text, tokens))):
            seconds = interleaved({"dense": how(dense, prompt), "sliced": how(sliced, prompt)}, rounds)
            many = {"prompt": length} if what == "reading" else {"tokens": tokens}
            keep("sliced_inference", setting | {"what": what, **many}, compare(seconds, "dense", "sliced"))


if __name__ == "__main__":
    main()

"""A pruned model as a draft: what is accepted, and that the dense model's text stays its own."""

import pytest
import torch

from secateur import bench, make_plan, open_model, prune
from secateur.data.texts import windows_for
from secateur.errors import InputError
from secateur.evaluation.speed import Timing

TIMING = Timing(prompts=(16,), new_tokens=12, repeats=1, warmup=0, draft_tokens=3)


def found(results):
    return {(one.role, one.measure): one for one in results}


def test_a_model_accepts_all_of_its_own_draft(bundled):
    results = found(bench(open_model("bundled"), as_draft_of=bundled, timing=TIMING))
    assert set(results) == {
        ("model", "draft_acceptance"),
        ("model", "tokens_per_check"),
        ("model", "assisted_tokens_per_second"),
        ("against", "assisted_tokens_per_second"),
    }
    settings = results["model", "draft_acceptance"].settings
    assert settings["same_text"] == 1
    assert settings["prompts"] == 8
    assert results["model", "draft_acceptance"].value == pytest.approx(1)
    assert results["model", "tokens_per_check"].value == 4  # three drafted, and the one of the check


def test_what_is_accepted_is_what_the_dense_model_would_have_written(bundled):
    """Counted by hand: greedy tokens of both models, draft by draft."""
    cut = prune(bundled, make_plan(bundled, method="last-n", blocks=2))
    results = found(bench(cut, as_draft_of=bundled, timing=TIMING))
    accepted = checks = 0
    for prompt in windows_for(bundled, None, windows=8, seq_len=16, split="held-out").tokens:
        text = greedy(bundled, prompt[None], 12)
        place = 16
        while place < text.shape[1]:
            room = min(3, text.shape[1] - place - 1)
            draft = greedy(cut, text[:, :place], room)[0, place:] if room else text[0, :0]
            agreed = (draft == text[0, place : place + len(draft)]).long().cumprod(0).sum()
            accepted, checks, place = accepted + int(agreed), checks + 1, place + int(agreed) + 1
    assert results["model", "tokens_per_check"].value == pytest.approx((accepted + checks) / checks)
    assert results["model", "draft_acceptance"].settings["same_text"] == 1


@torch.no_grad()
def greedy(model, tokens, count):
    for _ in range(count):
        best = model.module(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(dim=-1)
        tokens = torch.cat([tokens, best], dim=1)
    return tokens


def test_requests_that_cannot_be(bundled, tiny):
    with pytest.raises(InputError, match="leave against out"):
        bench(bundled, against=bundled, as_draft_of=bundled)
    with pytest.raises(InputError, match="a draft has at least one token"):
        Timing(draft_tokens=0)
    with pytest.raises(InputError, match="reads 512"):
        bench(bundled, as_draft_of=bundled, timing=Timing(prompts=(500,), new_tokens=30))

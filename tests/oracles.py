"""Plain computations that tests compare with: straight forward passes, whole and slow."""

import torch
from transformers import AutoModelForCausalLM

from secateur.data.windows import Windows
from secateur.models.anatomy import find
from secateur.models.families import FAMILIES
from secateur.models.forward import capture, logits, run_block
from secateur.surgery.depth.blocks import keep_blocks
from tiny_models import PAD, VOCABULARY


def draw_tokens(windows=4, positions=16, seed=0):
    """Random tokens without special ones, (windows, positions)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (windows, positions), generator=generator)


def pad(tokens, side):
    """Return tokens and mask in which window i lacks 3·i tokens on one side; nothing is padded for None."""
    if side is None:
        return tokens, None
    positions = tokens.shape[1]
    lengths = positions - 3 * torch.arange(len(tokens))[:, None]
    assert lengths.min() > 1
    place = torch.arange(positions)[None, :]
    mask = place < lengths if side == "right" else place >= positions - lengths
    return tokens.masked_fill(~mask, PAD), mask


def draw_windows(windows=4, positions=16, seed=0, side=None):
    """Random windows, padded on a side or not at all."""
    return Windows.of(*pad(draw_tokens(windows, positions, seed), side))


@torch.no_grad()
def forward(module, tokens, mask=None):
    """Logits of the plain forward pass."""
    given = {} if mask is None else {"attention_mask": mask.long()}
    return module(input_ids=tokens, use_cache=False, **given).logits


@torch.no_grad()
def walks(decoder, batches, without=()):
    """Logits of several batches: capture all, take all through each block in its turn, finish all."""
    captured = [capture(decoder, tokens, mask) for tokens, mask in batches]
    states = [hidden for hidden, _ in captured]
    for index in range(decoder.block_count):
        if index not in without:
            with decoder.block(index) as block:
                states = [
                    run_block(block, calls[index], hidden) for (_, calls), hidden in zip(captured, states, strict=True)
                ]
    with decoder.outer():
        return [logits(decoder, hidden, *batch) for hidden, batch in zip(states, batches, strict=True)]


def walk(decoder, tokens, mask=None, without=()):
    """Logits of one batch."""
    return walks(decoder, [(tokens, mask)], without)[0]


@torch.no_grad()
def plain_states(decoder, tokens, mask=None):
    """What enters each block and leaves the last, seen by hooks during a plain forward pass."""
    seen = []
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in decoder.block_list
    ]
    handles.append(
        decoder.block_list[-1].register_forward_hook(
            lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    try:
        forward(decoder.module, tokens, mask)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def predictions(tokens, mask=None):
    """Where a real token is predicted from a real token, (windows, positions − 1)."""
    return torch.ones_like(tokens[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:] & mask[:, :-1]


def plain_loss(module, windows):
    """Mean next-token loss in nats from the logits of one plain forward pass."""
    chances = forward(module, windows.tokens, windows.mask).double().log_softmax(dim=-1)[:, :-1]
    losses = -chances.gather(2, windows.tokens[:, 1:, None])[..., 0]
    return float(losses[predictions(windows.tokens, windows.mask)].mean())


def plain_divergence(dense, module, windows):
    """Mean over real tokens of Σ p log(p / q), p being the predictions of the dense module, in float64."""
    p, q = (forward(one, windows.tokens, windows.mask).double().softmax(dim=-1) for one in (dense, module))
    each = (p * (p / q).log()).sum(dim=-1)
    return float((each if windows.mask is None else each[windows.mask]).mean())


def loss_without(decoder, gone, windows):
    """Loss of the model from which these blocks were physically taken out."""
    kept = [index for index in range(decoder.block_count) if index not in gone]
    return plain_loss(keep_blocks(decoder, kept).module, windows)


def token_losses(module, windows):
    """Next-token losses, (windows, positions − 1), 0 where nothing is predicted; with gradients."""
    given = {} if windows.mask is None else {"attention_mask": windows.mask.long()}
    chances = module(input_ids=windows.tokens, use_cache=False, **given).logits.log_softmax(-1)[:, :-1]
    losses = -chances.gather(2, windows.tokens[:, 1:, None])[..., 0]
    return losses.masked_fill(~predictions(windows.tokens, windows.mask), 0)


def plain_taylor(module, windows, *, per_window=False):
    """Σ |w · ∂L/∂w| over non-bias parameters of each block; L is the mean over all predicted tokens.

    By plain backward passes through the whole model, which is changed: give a copy of your own.
    """
    module.requires_grad_(True)
    losses = token_losses(module, windows) / int(predictions(windows.tokens, windows.mask).sum())
    blocks = find(module, FAMILIES[module.config.model_type].blocks)
    weights = [{n: p for n, p in block.named_parameters() if n.split(".")[-1] != "bias"} for block in blocks]
    scores = [0.0] * len(blocks)
    for loss in losses.sum(dim=1) if per_window else [losses.sum()]:
        module.zero_grad()
        loss.backward(retain_graph=True)
        for index, of_block in enumerate(weights):
            scores[index] += sum(
                float((w * w.grad).detach().double().abs().sum()) for w in of_block.values() if w.grad is not None
            )
    return scores


def no_real_parameters(module):
    """Whether every parameter is on the meta device."""
    return all(parameter.is_meta for parameter in module.parameters())


def reloaded(module, folder):
    """Save a module and open it with plain transformers."""
    module.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

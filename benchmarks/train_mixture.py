"""Train a small mixture of experts on the standard library's code and the manual's prose, for `experts_table.py`.

A stock Qwen3-MoE of 6 million parameters: 4 blocks of 16 experts, of which each token takes 2. Embeddings and
attention start as those of every third block of the bundled model, routers and experts at random. A load-balancing loss
for each block (Fedus et al. 2022, Switch Transformers) keeps the experts in use; that of transformers averages over
blocks first, and most experts then die. About 12 minutes on one core. The texts are the calibration splits, so held-out
text stays unseen.

    python benchmarks/train_mixture.py FOLDER
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from secateur import open_model
from secateur.data.texts import windows_for
from secateur.models.decoder import Decoder

TEXTS = {"python-stdlib": 12, "python-docs": 4}
"""How many windows of a batch are from each source; of prose there is little."""
LENGTH = 256
STEPS = 360
RATE, WARMUP, LAST = 2e-3, 20, 0.1
BLOCKS = 4
BALANCE = 0.02
"""Weight of the load-balancing loss of each block, which is 1 for an even load."""


def from_bundled(dense: Decoder) -> Qwen3MoeForCausalLM:
    """Build the untrained mixture."""
    torch.manual_seed(0)
    old = dense.config
    config = Qwen3MoeConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        num_hidden_layers=BLOCKS,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.head_dim,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=dict(old.rope_parameters),
        tie_word_embeddings=True,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.0,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    step = dense.block_count // BLOCKS
    given = dense.module.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(int(parts[2]) * step)
            old_name = ".".join(parts)
            if old_name in given and given[old_name].shape == parameter.shape:
                parameter.copy_(given[old_name])
    return model


def batches(dense: Decoder) -> Iterator[torch.Tensor]:
    """Yield batches without end, each source shuffled anew each time through."""
    sources = [windows_for(dense, source, windows=None, seq_len=LENGTH).tokens for source in TEXTS]
    print("windows:", [len(one) for one in sources], flush=True)
    generator = torch.Generator().manual_seed(0)
    orders: list[list[int]] = [[] for _ in sources]
    while True:
        rows = []
        for order, source, count in zip(orders, sources, TEXTS.values(), strict=True):
            if len(order) < count:
                order.extend(torch.randperm(len(source), generator=generator).tolist())
            rows += [source[order.pop()] for _ in range(count)]
        yield torch.stack(rows)


def main(folder: Path) -> None:
    """Train, and save in bfloat16 with the bundled model's tokenizer."""
    torch.set_num_threads(1)
    dense = open_model("bundled")
    assert dense.tokenizer is not None
    model = from_bundled(dense).train()
    print(f"{sum(one.numel() for one in model.parameters()):,} parameters", flush=True)
    decay = [one for one in model.parameters() if one.dim() > 1]
    other = [one for one in model.parameters() if one.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    began, seen = time.monotonic(), batches(dense)
    for step in range(STEPS):
        share = min(1.0, (step + 1) / WARMUP)
        cosine = LAST + (1 - LAST) * (1 + math.cos(math.pi * step / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = RATE * share * cosine
        tokens = next(seen)
        found = model(input_ids=tokens, labels=tokens, use_cache=False)
        balance = torch.stack([imbalance(logits, model.config.num_experts_per_tok) for logits in found.router_logits])
        optimizer.zero_grad()
        (found.loss + BALANCE * balance.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            uneven, seconds = balance.mean().item(), time.monotonic() - began
            print(f"step {step}: loss {found.loss.item():.3f}, imbalance {uneven:.2f}, {seconds:.0f} s", flush=True)
        if (step + 1) % 120 == 0:
            save(model, dense, folder)


def imbalance(logits: torch.Tensor, chosen: int) -> torch.Tensor:
    """Return E Σ_j (share of the choices that expert j gets) (mean probability of expert j), given logits (M, E)."""
    probabilities = logits.float().softmax(dim=-1)
    choices = torch.zeros_like(probabilities).scatter(1, probabilities.topk(chosen, dim=-1).indices, 1.0 / chosen)
    return logits.shape[1] * (choices.mean(dim=0) * probabilities.mean(dim=0)).sum()


def save(model: Qwen3MoeForCausalLM, dense: Decoder, folder: Path) -> None:
    """Write a checkpoint in bfloat16."""
    assert dense.tokenizer is not None
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = Qwen3MoeForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.config.output_router_logits = False
    copy.save_pretrained(folder)
    dense.tokenizer.save_pretrained(folder)
    model.config.output_router_logits = True


if __name__ == "__main__":
    main(Path(sys.argv[1]))

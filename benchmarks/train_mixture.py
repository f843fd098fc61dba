"""Train a small mixture of experts on the standard library's code and the manual's prose, for `experts_table.py`.

A stock Qwen3-MoE of 8.5 million parameters: 6 blocks of 16 experts, of which each token takes 4. It is upcycled from
every second block of the bundled model (Komatsuzaki et al. 2023, "Sparse Upcycling: Training Mixture-of-Experts from
Dense Checkpoints", arXiv:2212.05055) as Qwen1.5-MoE was: every channel of a dense MLP is in four experts, divided up
anew for each four, so that experts begin alike and training makes them differ. A load-balancing loss for each block
(Fedus et al. 2022, Switch Transformers) keeps the experts in use; that of transformers averages over blocks first, and
most experts then die. About 5 minutes on one core. The texts are the calibration splits, so held-out text stays
unseen.

    python benchmarks/train_mixture.py FOLDER
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from secateur import open_model
from secateur.data.texts import windows_for
from secateur.models.decoder import Decoder

TEXTS = {"python-stdlib": 6, "python-docs": 2}
"""How many windows of a batch are from each source; of prose there is little."""
LENGTH = 256
STEPS = 150
RATE, WARMUP, LAST = 2e-3, 15, 0.1
BLOCKS, EXPERTS, CHOSEN, CHANNELS = 6, 16, 4, 128
BALANCE = 0.01
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
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=CHANNELS,
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
        for number, block in enumerate(model.model.layers):
            upcycle(block.mlp.experts, dense.block_list[number * step].mlp)
    return model


def upcycle(experts: nn.Module, mlp: nn.Module) -> None:
    """Fill experts with the channels of a dense MLP, shuffled and divided up as often as there is room.

    Outputs are scaled so that the mean over experts is what the MLP writes; the weights of a token sum to 1.
    """
    width = mlp.down_proj.weight.shape[1]
    parts = [torch.randperm(width).split(CHANNELS) for _ in range(EXPERTS * CHANNELS // width)]
    for number, channels in enumerate(channels for part in parts for channels in part):
        both = torch.cat([mlp.gate_proj.weight[channels], mlp.up_proj.weight[channels]])
        experts.gate_up_proj[number] = both
        experts.down_proj[number] = mlp.down_proj.weight[:, channels] * (width / CHANNELS)


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
        if (step + 1) % 50 == 0:
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

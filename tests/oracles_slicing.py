"""SliceGPT written from the paper: float64, the whole model in memory, nothing from secateur.

Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", sections 3 and 4: norms
are folded into the layers that read the stream; at each reading point Q has the first d eigenvectors of Σ XᵀX, readers
become W Q, writers Qᵀ W, and residual connections Q_inᵀ Q_out.

Legend: D = width of the stream, Q (D, d) = kept directions at a reading point, x (windows, positions, d) =
the residual stream in the coordinates of Q; weights are (out, in).
"""

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass
class Linear:
    weight: torch.Tensor
    bias: torch.Tensor | float = 0.0

    def __call__(self, x):
        return x @ self.weight.T + self.bias


@dataclass
class Block:
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    gate: Linear | None
    up: Linear
    down: Linear


@dataclass
class Dense:
    """A decoder whose norms are folded: every norm is x / sqrt(sum x² / D + eps)."""

    stream: torch.Tensor
    blocks: list[Block]
    head: Linear
    heads: int
    head_dim: int
    eps: float
    act: object
    parallel: bool
    rotary: int
    theta: float
    real: torch.Tensor

    def norm(self, x):
        return x * (x.square().sum(-1, keepdim=True) / self.stream.shape[-1] + self.eps).rsqrt()

    def attention(self, block, x):
        """What attention adds, in whatever coordinates `out` writes."""
        normed = self.norm(x)
        split = [one(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in _qkv(block)]
        query, key, value = (one.repeat_interleave(self.heads // one.shape[1], dim=1) for one in split)
        places = torch.arange(x.shape[1])
        query, key = self.turned(query, places), self.turned(key, places)
        seen = (places[None, :] <= places[:, None]) & self.real[:, None, None, :]
        scores = (query @ key.transpose(-1, -2) / self.head_dim**0.5).masked_fill(~seen, -1e30)
        return block.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def turned(self, states, places):
        if not self.rotary:
            return states
        half = self.rotary // 2
        angles = places[:, None] * self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        first, second, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def mlp(self, block, x):
        """What the MLP adds, in whatever coordinates `down` writes."""
        normed = self.norm(x)
        inner = block.up(normed)
        return block.down(self.act(inner) if block.gate is None else self.act(block.gate(normed)) * inner)

    def loss(self, x, tokens):
        """Mean loss in nats where a real token is predicted from a real one."""
        chances = self.head(self.norm(x)).log_softmax(-1)[:, :-1]
        losses = -chances.gather(2, tokens[:, 1:, None])[..., 0]
        return float(losses[self.real[:, 1:] & self.real[:, :-1]].mean())


def _qkv(block):
    return block.query, block.key, block.value


def folded_llama(module, tokens, real):
    config = module.config

    def block(layer):
        read, write = _reader(layer.input_layernorm), layer.self_attn
        then, mlp = _reader(layer.post_attention_layernorm), layer.mlp
        return Block(
            *map(read, (write.q_proj, write.k_proj, write.v_proj)), _plain(write.o_proj),
            then(mlp.gate_proj), then(mlp.up_proj), _plain(mlp.down_proj),
        )  # fmt: skip

    return Dense(
        stream=_double(module.model.embed_tokens.weight)[tokens],
        blocks=[block(layer) for layer in module.model.layers],
        head=_reader(module.model.norm)(module.lm_head),
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        act=functional.silu,
        parallel=False,
        rotary=config.head_dim,
        theta=config.rope_parameters["rope_theta"],
        real=real,
    )


def folded_opt(module, tokens, real):
    decoder, config = module.model.decoder, module.config

    def block(layer):
        read, then, attention = _reader(layer.self_attn_layer_norm), _reader(layer.final_layer_norm), layer.self_attn
        return Block(
            *map(read, (attention.q_proj, attention.k_proj, attention.v_proj)), _centred(_plain(attention.out_proj)),
            None, then(layer.fc1), _centred(_plain(layer.fc2)),
        )  # fmt: skip

    places = (real.long().cumsum(-1) - 1).masked_fill(~real, -1) + 2
    stream = _double(decoder.embed_tokens.weight)[tokens] + _double(decoder.embed_positions.weight)[places]
    return Dense(
        stream=stream - stream.mean(-1, keepdim=True),
        blocks=[block(layer) for layer in decoder.layers],
        head=_reader(decoder.final_layer_norm)(module.lm_head),
        heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        eps=1e-5,
        act=functional.relu,
        parallel=False,
        rotary=0,
        theta=1.0,
        real=real,
    )


def folded_neox(module, tokens, real):
    config = module.config
    size = config.hidden_size // config.num_attention_heads

    def block(layer):
        read, then, attention = _reader(layer.input_layernorm), _reader(layer.post_attention_layernorm), layer.attention
        fused = read(attention.query_key_value)
        weights = fused.weight.view(config.num_attention_heads, 3, size, -1)
        biases = fused.bias.view(config.num_attention_heads, 3, size)
        return Block(
            *(Linear(weights[:, one].flatten(0, 1), biases[:, one].flatten()) for one in range(3)),
            _centred(_plain(attention.dense)), None, then(layer.mlp.dense_h_to_4h),
            _centred(_plain(layer.mlp.dense_4h_to_h)),
        )  # fmt: skip

    stream = _double(module.gpt_neox.embed_in.weight)[tokens]
    return Dense(
        stream=stream - stream.mean(-1, keepdim=True),
        blocks=[block(layer) for layer in module.gpt_neox.layers],
        head=_reader(module.gpt_neox.final_layer_norm)(module.lm_head),
        heads=config.num_attention_heads,
        head_dim=size,
        eps=config.layer_norm_eps,
        act=functional.gelu,
        parallel=config.use_parallel_residual,
        rotary=int(size * config.rope_parameters["partial_rotary_factor"]),
        theta=config.rope_parameters["rope_theta"],
        real=real,
    )


FOLDED = {"llama": folded_llama, "opt": folded_opt, "gpt_neox": folded_neox}


def slicegpt_loss(module, tokens, widths, real=None, signals="raw", head=None):
    """Mean loss of the model sliced to `widths` (one per block), the head at full width or at one of its own."""
    real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
    dense = FOLDED[module.config.model_type](module, tokens, real)
    full = torch.eye(dense.stream.shape[-1], dtype=torch.float64)

    def directions(hidden, width):
        tokens_TD = (dense.norm(hidden) if signals == "normed" else hidden)[real]
        return torch.linalg.eigh(tokens_TD.T @ tokens_TD).eigenvectors.flip(-1)[:, :width]

    here = directions(dense.stream, widths[0])
    x = dense.stream @ here
    for index, block in enumerate(dense.blocks):
        last = index + 1 == len(dense.blocks)
        reads = _attention_reading(block, here)
        if not dense.parallel:
            added = dense.attention(reads, x)
            middle = directions(x @ here.T + added, widths[index])
            x = x @ (here.T @ middle) + dense.attention(_written(reads, middle, "out"), x)
            here = middle
        reads = _mlp_reading(reads, here)
        added = dense.mlp(reads, x) + (dense.attention(reads, x) if dense.parallel else 0)
        width = head if last else widths[index + 1]
        after = full if width is None else directions(x @ here.T + added, width)
        writes = _written(_written(reads, after, "down"), after, "out")
        added = dense.mlp(writes, x) + (dense.attention(writes, x) if dense.parallel else 0)
        x = x @ (here.T @ after) + added
        here = after
    dense.head = _read(dense.head, here)
    return dense.loss(x, tokens)


def _attention_reading(block, here):
    return _replaced(block, **{n: _read(getattr(block, n), here) for n in ("query", "key", "value")})


def _mlp_reading(block, here):
    return _replaced(block, **{n: _read(getattr(block, n), here) for n in ("gate", "up")})


def _written(block, after, name):
    old = getattr(block, name)
    return _replaced(block, **{name: Linear(after.T @ old.weight, old.bias @ after if _has(old.bias) else 0.0)})


def _read(linear, here):
    return None if linear is None else Linear(linear.weight @ here, linear.bias)


def _replaced(block, **changes):
    return Block(**{**vars(block), **changes})


def _has(bias):
    return isinstance(bias, torch.Tensor)


def _double(tensor):
    return tensor.detach().double()


def _plain(linear):
    return Linear(_double(linear.weight), 0.0 if linear.bias is None else _double(linear.bias))


def _centred(linear):
    """Without the mean over the directions that are written to."""
    return Linear(linear.weight - linear.weight.mean(0), linear.bias - linear.bias.mean())


def _reader(norm):
    """Fold a norm's scale and bias into what reads from it."""

    def fold(linear):
        plain, shift = _plain(linear), getattr(norm, "bias", None)
        bias = plain.bias if shift is None else plain.bias + plain.weight @ _double(shift)
        return Linear(plain.weight * _double(norm.weight), bias)

    return fold

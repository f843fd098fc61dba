"""Replace a window of blocks by a lightweight MLP (LLM-Streamline, Chen et al. 2024, section 3.2).

No stock architecture has a block without attention, so the model is converted (`hidden/folding.py`) to the architecture
of the modelling file, at full width and without shortcut matrices.
"""

from __future__ import annotations

from typing import Any

import torch

from secateur.modeling import SecateurConfig
from secateur.modeling.modeling_secateur import SecateurDecoderLayer
from secateur.models.decoder import Decoder
from secateur.models.depth import config_with_blocks
from secateur.models.families import FAMILIES
from secateur.plan.steps import Network, Span
from secateur.surgery.assembly import Assembly, Tensors
from secateur.surgery.hidden.folding import can_stay_tied, folded_block, folded_config
from secateur.surgery.hidden.outer import put_outer

_FAMILY = FAMILIES[SecateurConfig.model_type]
_SPREAD = 0.02
"""Initial standard deviation of input projections; output projections start at 0, so that nothing is added."""


def network_config(decoder: Decoder, window: Span, network: Network, inner: int | None = None) -> SecateurConfig:
    """Return the configuration of the folded model with an MLP of `inner` channels in place of the window.

    Raises:
        ModelError: the family cannot be folded.
    """
    low, high = window
    kept = [block for block in range(decoder.block_count) if not low < block <= high]
    folded = folded_config(decoder, "no module without attention can be inserted", tied=can_stay_tied(decoder))
    config: SecateurConfig = config_with_blocks(folded, _FAMILY, kept)
    own = {"intermediate_sizes": inner, "experts": 0, "networks": network}
    for name, value in own.items():
        if value is not None:
            getattr(config, name)[low] = value
    return config


def new_network(config: SecateurConfig, low: int, device: torch.device, seed: int) -> SecateurDecoderLayer:
    """Return the replacement module for block `low`, which initially adds nothing to the residual stream."""
    layer = SecateurDecoderLayer(config, low).to(device, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        reads = parameter.dim() == 2 and "down_proj" not in name
        values = torch.randn(parameter.shape, generator=generator) * _SPREAD if reads else torch.zeros(parameter.shape)
        parameter.data.copy_(values)
    return layer


@torch.no_grad()
def with_network(decoder: Decoder, config: SecateurConfig, window: Span, tensors: Tensors, edit: Any) -> Decoder:
    """Return the folded decoder with the module in place of the window; the given one is unchanged.

    Args:
        decoder: the dense model.
        config: from `network_config`.
        window: first and last block of the window.
        tensors: parameters of the module.
        edit: description of the edit as data, from which the result's fingerprint is made.
    """
    assembly = Assembly(decoder, config, _FAMILY)
    put_outer(assembly, None, None)
    low, high = window
    for place, index in enumerate(one for one in range(decoder.block_count) if not low < one <= high):
        if index == low:
            assembly.put(assembly.block_path(place), tensors)
        else:
            with decoder.block(index):
                assembly.put(assembly.block_path(place), folded_block(decoder, index))
        assembly.finish(place)
    return assembly.result(edit)

"""The modelling file for shapes that no stock architecture supports; it is saved next to the weights.

Importing this package registers it with transformers' Auto classes, so that such folders open without remote code.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from secateur.modeling.modeling_secateur import (
    DeciLMConfig,
    DeciLMForCausalLM,
    DeciLMModel,
    SecateurConfig,
    SecateurExperts,
    SecateurForCausalLM,
    SecateurModel,
    mlp_traits,
)

MODELLING_FILE = Path(__file__).with_name("modeling_secateur.py")


def auto_map(config: SecateurConfig) -> dict[str, str]:
    """Return the entries of `config.json` by which `trust_remote_code=True` finds the classes without secateur."""
    kind = "DeciLM" if isinstance(config, DeciLMConfig) else "Secateur"
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return {auto: f"{MODELLING_FILE.stem}.{kind}{name}" for auto, name in classes.items()}


for _config, _model, _causal in (
    (SecateurConfig, SecateurModel, SecateurForCausalLM),
    (DeciLMConfig, DeciLMModel, DeciLMForCausalLM),
):
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _causal.register_for_auto_class("AutoModelForCausalLM")  # whoever saves one saves this file beside it
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)

__all__ = [
    "MODELLING_FILE",
    "DeciLMConfig",
    "DeciLMForCausalLM",
    "DeciLMModel",
    "SecateurConfig",
    "SecateurExperts",
    "SecateurForCausalLM",
    "SecateurModel",
    "auto_map",
    "mlp_traits",
]

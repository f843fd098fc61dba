"""The modelling file for shapes that no stock architecture supports; it is saved next to the weights.

Importing this package registers it with transformers' Auto classes, so that such folders open without remote code.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from secateur.modeling.modeling_secateur import (
    SecateurConfig,
    SecateurExperts,
    SecateurForCausalLM,
    SecateurModel,
    mlp_traits,
)

MODELLING_FILE = Path(__file__).with_name("modeling_secateur.py")

AUTO_MAP = {
    "AutoConfig": "modeling_secateur.SecateurConfig",
    "AutoModel": "modeling_secateur.SecateurModel",
    "AutoModelForCausalLM": "modeling_secateur.SecateurForCausalLM",
}
"""Entries of `config.json` by which `trust_remote_code=True` finds the classes without secateur."""

SecateurConfig.register_for_auto_class()
SecateurModel.register_for_auto_class("AutoModel")
SecateurForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # whoever saves one saves this file beside it
AutoConfig.register(SecateurConfig.model_type, SecateurConfig, exist_ok=True)
AutoModel.register(SecateurConfig, SecateurModel, exist_ok=True)
AutoModelForCausalLM.register(SecateurConfig, SecateurForCausalLM, exist_ok=True)

__all__ = [
    "AUTO_MAP",
    "MODELLING_FILE",
    "SecateurConfig",
    "SecateurExperts",
    "SecateurForCausalLM",
    "SecateurModel",
    "mlp_traits",
]

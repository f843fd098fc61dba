"""Version of secateur, versions of the libraries a result depends on, and fingerprints of plain data."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib.metadata import version
from typing import Any

__version__ = "0.1.0"
_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "datasets", "numpy", "lm_eval")


def versions() -> dict[str, str]:
    """Return the versions of secateur, Python and the packages that can change a result."""
    return {"secateur": __version__, "python": platform.python_version(), **_installed()}


@cache
def _installed() -> dict[str, str]:
    """Look up package versions once, because it takes tens of milliseconds."""
    return {name: version(name) for name in _PACKAGES}


def digest(*parts: Any) -> str:
    """Return a short fingerprint of plain data, such as settings and versions."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

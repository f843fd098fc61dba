"""Which software made a result."""

from __future__ import annotations

import platform
from importlib.metadata import version

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "datasets", "numpy", "lm_eval")


def secateur_version() -> str:
    """Version of secateur itself."""
    import secateur  # here, because the package imports this module while it is being imported

    return secateur.__version__


def versions() -> dict[str, str]:
    """Versions of secateur, Python and the packages that can change a result."""
    found = {"secateur": secateur_version(), "python": platform.python_version()}
    return found | {name: version(name) for name in _PACKAGES}

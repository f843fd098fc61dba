"""Render chat templates, one request per line of standard input; ends with it.

Run as a script: `python -P render_template.py`. A request is `{chat_template, special, messages, asks}`, an answer
`{text}` or `{error}`. An empty object says that it is ready. Torch is not needed, and not imported (`USE_TORCH=0`).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

_MORE_BYTES = 1 << 30
"""Memory that templates may take, beyond what the process has when it is ready."""


def rendered(asked: dict[str, Any]) -> dict[str, str]:
    """Render one conversation with transformers' own function."""
    try:
        found, _ = render_jinja_template(
            conversations=[asked["messages"]],
            chat_template=asked["chat_template"],
            add_generation_prompt=asked["asks"],
            **asked["special"],
        )
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # noqa: BLE001 - a template is third-party code, and may raise anything
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    return {"text": found[0]}


def limit_memory() -> None:
    """Limit the address space, where the system can."""
    if sys.platform == "linux":
        import resource
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + _MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Answer until standard input ends."""
    limit_memory()
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(rendered(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

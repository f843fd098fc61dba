"""Plans of removed blocks as other tools write them."""

from __future__ import annotations

import shlex
from typing import Literal

import yaml

from secateur.errors import InputError, unknown
from secateur.plan.plan import Plan

Tool = Literal["mergekit", "llama.cpp"]
TOOLS: tuple[Tool, ...] = ("mergekit", "llama.cpp")


def require_tool(tool: str) -> None:
    """Refuse an unknown tool.

    Raises:
        InputError: the message lists the known ones.
    """
    if tool not in TOOLS:
        raise unknown("tool", tool, list(TOOLS))


def plan_as(plan: Plan, tool: str, dtype: str = "bfloat16") -> str:
    """Return what does the same as a plan of removed blocks in another tool.

    Args:
        plan: the plan.
        tool: `mergekit` (the YAML of a passthrough merge) or `llama.cpp` (a call of llama-quantize).
        dtype: dtype in which mergekit saves.

    Raises:
        InputError: an unknown tool, or a plan that does something other than removing blocks.
    """
    require_tool(tool)
    others = sorted({step.method for step in plan.steps if step.kind != "drop-blocks"})
    if others:
        raise InputError(f"{tool} can only leave out blocks, and {', '.join(others)} does more; use `secateur prune`.")
    kept = plan.kept_blocks()
    count = len(plan.model.block_parameters)
    return _mergekit(plan.model.source, kept, dtype) if tool == "mergekit" else _llama_cpp(kept, count)


def _mergekit(source: str, kept: tuple[int, ...], dtype: str) -> str:
    """Return a passthrough merge of the runs of blocks that remain; mergekit's ranges leave out their end."""
    runs: list[list[int]] = []
    for block in kept:
        if runs and runs[-1][1] == block:
            runs[-1][1] += 1
        else:
            runs.append([block, block + 1])
    slices = [{"sources": [{"model": source, "layer_range": run}]} for run in runs]
    return yaml.safe_dump({"slices": slices, "merge_method": "passthrough", "dtype": dtype}, sort_keys=False)


def _llama_cpp(kept: tuple[int, ...], count: int) -> str:
    gone = ",".join(str(block) for block in range(count) if block not in kept)
    return shlex.join(["llama-quantize", "--prune-layers", gone, "dense.gguf", "cut.gguf", "F16"]) + "\n"

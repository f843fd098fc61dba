"""What reads and what writes the residual stream, found by what changes its shape with the hidden size.

A small copy is made with a smaller hidden size. What then has another shape lies along the stream: matrices that write
to it, and others that read from it through a norm, which is seen while the copy runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.models.anatomy import EXPERT_TENSORS, Family, NormKind, Stream, find, owner_of
from secateur.models.decoder import Decoder
from secateur.models.trial_copies import trial_tokens
from secateur.models.wrappers import auto_class
from secateur.surgery.hidden.directions import unit_scale
from secateur.surgery.hidden.folding import norm_eps, scaled_by_norm
from secateur.surgery.hidden.stock import config_of_width, width_step

STEP = 8
"""Hidden sizes of copies are multiples of this."""
ALLOWED = 1e-4
"""Difference that is rounding, relative to the largest number."""


class MisunderstoodError(Exception):
    """Something along the stream that cannot be rotated; the message is a clause that says what."""


@dataclass(frozen=True)
class _Role:
    """What a tensor does that has an axis along the stream."""

    kind: Literal["reader", "writer", "norm", "table"]
    axis: int


@dataclass
class _Seen:
    """What was called while a copy ran: its norms in order, and those whose outputs each reader was given."""

    order: list[str] = field(default_factory=list)
    norms: dict[str, set[str]] = field(default_factory=dict)

    def norm_of(self, reader: str) -> str:
        """Return the norm that a reader reads from."""
        found = self.norms.get(reader, set())
        if len(found) != 1:
            raise MisunderstoodError(f"`{reader}` does not read the output of one norm")
        return next(iter(found))


def row_with_stream(copy_of: Decoder) -> Family:
    """Return the row of a small copy with its stream as it appears, not yet proved; its weights are drawn anew.

    Raises:
        MisunderstoodError: something along the stream is neither a reader, a writer nor a norm before a branch.
    """
    family = copy_of.anatomy.family
    head = f"{family.head}.weight"
    if any(
        isinstance(one, nn.LayerNorm) and copy_of.hidden_size in one.normalized_shape
        for one in copy_of.module.modules()
    ):
        raise MisunderstoodError("its norms subtract a mean, which is not that of fewer directions")
    axes = _axes(copy_of)
    _draw(copy_of, axes)
    seen = _watched(copy_of, axes)
    inside, outside = _roles(copy_of, axes)
    final = seen.norm_of(head)
    for path, role in outside.items():
        if role.kind != "table" and path not in (head, f"{final}.weight"):
            raise MisunderstoodError(
                f"`{path}` stands between its embeddings and its blocks, or between these and its head"
            )
    readers: dict[str, list[tuple[str, int]]] = {}
    for path, role in inside.items():
        if role.kind == "reader":
            readers.setdefault(seen.norm_of(path), []).append((path, role.axis))
    for path, role in inside.items():
        if role.kind == "norm" and path.removesuffix(".weight") not in readers:
            raise MisunderstoodError(f"its norm `{path.removesuffix('.weight')}` does not stand before a projection")
    order = tuple(sorted(readers, key=seen.order.index))
    return replace(
        family,
        norm=_kind_of_norms(copy_of, (*order, final)),
        norms=order,
        final=(final,),
        stream=Stream(
            readers=tuple((norm, tuple(readers[norm])) for norm in order),
            writers=tuple((path, role.axis) for path, role in inside.items() if role.kind == "writer"),
            tables=tuple(path for path, role in outside.items() if role.kind == "table"),
        ),
    )


def _roles(copy_of: Decoder, axes: dict[str, int]) -> tuple[dict[str, _Role], dict[str, _Role]]:
    """Return what tensors do by their paths in a block, and those outside of blocks by their names."""
    inside: dict[str, _Role] = {}
    outside: dict[str, _Role] = {}
    for name, axis in axes.items():
        role, path = _role(copy_of, name, axis), _path(copy_of, name)
        if path == name:
            outside[name] = role
        elif inside.setdefault(path, role) != role:
            raise MisunderstoodError(f"`{path}` does one thing in some blocks and another in others")
    return inside, outside


def _axes(copy_of: Decoder) -> dict[str, int]:
    """Return the axis along the stream of each tensor that has one."""
    dense, step = copy_of.hidden_size, width_step(copy_of, STEP)
    if step is None:
        raise MisunderstoodError(f"its configuration allows no smaller hidden size ({_objection(copy_of)})")
    width = (dense - 1) // step * step
    after = _shapes(config_of_width(copy_of, width))
    head = f"{copy_of.anatomy.family.head}.weight"
    found = {}
    for name, tensor in (*copy_of.module.named_parameters(), (head, find(copy_of.module, head))):
        pairs = enumerate(zip(tensor.shape, after[name], strict=True))
        changed = {axis: (old, new) for axis, (old, new) in pairs if old != new}
        if len(changed) > 1 or any(sizes != (dense, width) for sizes in changed.values()):
            raise MisunderstoodError(f"an inner size follows from the hidden size (that of `{_path(copy_of, name)}`)")
        for axis in changed:
            found[name] = axis
    return found


def _objection(copy_of: Decoder) -> str:
    """Return what the configuration says against a smaller hidden size."""
    try:
        config_of_width(copy_of, copy_of.hidden_size - STEP)
    except (StrictDataclassError, ValueError) as error:
        return str(error).strip().splitlines()[-1].strip()
    return f"not even of {copy_of.hidden_size - STEP} by {copy_of.hidden_size}"


def _path(copy_of: Decoder, name: str) -> str:
    """Return the name of a tensor in its block, or in the model."""
    blocks = f"{copy_of.anatomy.family.blocks}."
    return name.removeprefix(blocks).partition(".")[2] if name.startswith(blocks) else name


def _shapes(config: Any) -> dict[str, torch.Size]:
    """Return the shapes of the parameters of a model with this configuration, as it is read from a file."""
    with torch.device("meta"):
        module = auto_class(config).from_config(type(config).from_dict(config.to_dict()))
    return {name: one.shape for name, one in module.named_parameters()}


def _draw(copy_of: Decoder, axes: dict[str, int]) -> None:
    """Draw what lies along the stream anew, so that each part of it matters."""
    generator = torch.Generator().manual_seed(0)
    tied = f"{copy_of.anatomy.family.head}.weight" if copy_of.anatomy.tied else ""
    for name in axes:
        if name == tied:
            continue
        tensor = find(copy_of.module, name)
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() == 1:
            tensor.add_(0.2 * noise)
        else:
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)


def _role(copy_of: Decoder, name: str, axis: int) -> _Role:
    """Return what a tensor along the stream does."""
    tensor, owner = find(copy_of.module, name), owner_of(copy_of.module, name)
    leaf = name.rpartition(".")[2]
    if isinstance(owner, nn.Linear | Conv1D):
        reads = tensor.dim() > 1 and (axis == 1) != isinstance(owner, Conv1D)
        return _Role("reader" if reads else "writer", axis)
    if isinstance(owner, nn.Embedding) and axis == 1:
        return _Role("table", axis)
    if leaf in EXPERT_TENSORS and tensor.dim() == 3:
        return _Role("writer" if leaf == "down_proj" else "reader", axis)
    if leaf == "weight" and tensor.dim() == 1:
        return _Role("norm", axis)
    if leaf == "weight" and tensor.dim() == 2 and axis == 1:  # a router
        return _Role("reader", axis)
    if leaf == "down_proj_bias" and axis == 1:
        return _Role("writer", axis)
    raise MisunderstoodError(f"`{_path(copy_of, name)}` is no projection and no norm")


def _watched(copy_of: Decoder, axes: dict[str, int]) -> _Seen:
    """Run a copy and note from which norm of its block each reader reads; the head reads from one outside."""
    seen = _Seen()
    outputs: dict[str, dict[str, torch.Tensor]] = {}

    def norm(where: str, path: str, output: torch.Tensor) -> None:
        outputs.setdefault(where, {})[path] = output
        if path not in seen.order:
            seen.order.append(path)

    def reader(where: str, path: str, given: tuple[Any, ...]) -> None:
        for name, output in outputs.get(where, {}).items():
            if any(_same_rows(one, output) for one in given if isinstance(one, torch.Tensor)):
                seen.norms.setdefault(path, set()).add(name)

    hooks = []
    for name, axis in axes.items():
        path = _path(copy_of, name)
        number = name.removesuffix(path)
        owner, kind = owner_of(copy_of.module, name), _role(copy_of, name, axis).kind
        if kind == "norm":
            where = path.removesuffix(".weight")
            hooks.append(owner.register_forward_hook(lambda _m, _a, out, n=number, p=where: norm(n, p, out)))
        elif kind == "reader":
            hooks.append(
                owner.register_forward_pre_hook(
                    lambda _m, args, named, n=number, p=path: reader(n, p, (*args, *named.values())), with_kwargs=True
                )
            )
    try:
        copy_of.module(input_ids=trial_tokens(copy_of), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _same_rows(given: torch.Tensor, output: torch.Tensor) -> bool:
    """Return whether each row is a multiple of what a norm gives for the same token; tokens may be there repeatedly."""
    rows = output.flatten(0, -2)
    if not given.is_floating_point() or given.shape[-1] != rows.shape[-1] or given.dim() < 2:
        return False
    found = given.flatten(0, -2)
    times_over, rest = divmod(len(found), len(rows))
    if rest or not times_over:
        return False
    expected = rows.repeat(times_over, 1)
    factors = (found * expected).sum(-1, keepdim=True) / expected.square().sum(-1, keepdim=True)
    return torch.allclose(found, factors * expected, rtol=0, atol=ALLOWED * float(found.abs().max()))


def _kind_of_norms(copy_of: Decoder, paths: Sequence[str]) -> NormKind:
    """Return whether norms multiply by their weights, or by one more."""
    found: set[NormKind] = set()
    for name, norm in copy_of.module.named_modules():
        if _path(copy_of, name) not in paths:
            continue
        states = torch.randn(4, copy_of.hidden_size, generator=torch.Generator().manual_seed(0))
        normed: torch.Tensor = norm(states)
        kinds: tuple[NormKind, ...] = ("rms", "rms-plus-one")
        alike = [one for one in kinds if torch.allclose(normed, _normed(states, norm, one), rtol=1e-3, atol=1e-3)]
        if not alike or getattr(norm, "bias", None) is not None:
            raise MisunderstoodError(f"its norm `{_path(copy_of, name)}` does not only divide by the root mean square")
        found.add(alike[0])
    if len(found) > 1:
        raise MisunderstoodError("its norms differ in kind")
    return found.pop()


def _normed(states: torch.Tensor, norm: nn.Module, kind: NormKind) -> torch.Tensor:
    return scaled_by_norm(unit_scale(states, norm_eps(norm)), norm, kind)

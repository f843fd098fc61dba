"""What a plan records for its readers, as plain data, checked when it is read, so that all of them find its keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

Amount = str | int | float | None


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Texts(_Record):
    source: str
    fingerprint: str
    windows: int = Field(ge=1)
    seq_len: int = Field(ge=1)


class _Bytes(_Record):
    bytes: int
    dense_bytes: int
    context: int
    dtype: str


class _Seconds(_Record):
    speedup: float
    seconds: float
    dense_seconds: float
    prompt: int
    new_tokens: int
    dtype: str
    device: str


_TARGETS: TypeAdapter[_Bytes | _Seconds] = TypeAdapter(_Bytes | _Seconds)


def _texts(data: dict[str, Any]) -> dict[str, Any]:
    if data:
        _Texts.model_validate(data)
    return data


def _target(data: dict[str, Any]) -> dict[str, Any]:
    if data:
        _TARGETS.validate_python(data)
    return data


TextsRecord = Annotated[dict[str, Any], AfterValidator(_texts)]
"""Source, fingerprint and shape of windows, as `Windows.describe` returns them; or nothing."""

TargetRecord = Annotated[dict[str, Any], AfterValidator(_target)]
"""What a target in bytes or seconds is based on, and what a plan is expected to reach; or nothing."""

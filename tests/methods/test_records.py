"""Measurements kept on disk: made once, and again where the file is damaged."""

from typing import Annotated

import pytest
from pydantic import Field, TypeAdapter

from secateur.methods.records import recorded

PAIR = TypeAdapter(Annotated[tuple[float, ...], Field(min_length=2, max_length=2)])


def test_measured_once(tmp_path):
    path = tmp_path / "new" / "record.json"
    found = recorded(path, PAIR, lambda: (0.1, 1 / 3))
    assert recorded(path, PAIR, lambda: pytest.fail("it is known")) == found == (0.1, 1 / 3)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1.0]", b"[1.0, null]", b"[1.0, 2.0, 3.0]", b"\xff\xfe", b"[" * 9999])
def test_damaged_records_are_made_again(tmp_path, damage):
    path = tmp_path / "record.json"
    path.write_bytes(damage)
    assert recorded(path, PAIR, lambda: (1.0, 2.0)) == (1.0, 2.0)
    assert recorded(path, PAIR, lambda: (3.0, 4.0)) == (1.0, 2.0)

"""Windows of tokens: what is in them, and what is refused."""

import json

import numpy as np
import pytest
import torch

from secateur.data.texts import Reader, open_texts
from secateur.data.windows import Windows
from secateur.errors import InputError

# Windows


def test_windows_of_your_own_are_used_as_given():
    given = np.arange(24, dtype=np.uint16).reshape(4, 6)
    windows = Windows.of(given, source="mine")
    assert windows.tokens.dtype == torch.int64
    assert torch.equal(windows.tokens, torch.arange(24).view(4, 6))
    assert (len(windows), windows.seq_len, windows.token_count) == (4, 6, 24)
    assert (windows.source, windows.seed, windows.bos, windows.mask) == ("mine", None, False, None)
    assert torch.equal(Windows.of([[1, 2], [3, 4]]).tokens, torch.tensor([[1, 2], [3, 4]]))


def test_windows_do_not_change_with_the_array_they_were_made_of():
    given = torch.ones(2, 3, dtype=torch.int64)
    mask = torch.ones(2, 3, dtype=torch.bool)
    windows = Windows.of(given, mask)
    given[0, 0], mask[0, 0] = 5, False
    assert windows.tokens[0, 0] == 1
    assert windows.token_count == 6


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.ones(3, dtype=torch.int64), None, "table"),
        (torch.ones(0, 3, dtype=torch.int64), None, "table"),
        (torch.ones(2, 3), None, "integers, not float32"),
        (torch.ones(2, 3, dtype=torch.bool), None, "integers, not bool"),
        ([[1, -2]], None, "negative"),
        ([["a", "b"]], None, "not a table of numbers"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool), r"booleans \(2, 3\)"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), "not float32"),
        (torch.ones(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool), "without any token"),
    ],
)
def test_windows_refuse_what_is_not_a_table_of_ids(tokens, mask, message):
    with pytest.raises(InputError, match=message):
        Windows.of(tokens, mask)


def test_batches_cover_all_windows_in_order():
    mask = torch.ones(5, 2, dtype=torch.bool)
    mask[4, 1] = False
    windows = Windows.of(torch.arange(10).view(5, 2), mask)
    batches = list(windows.batches(2))
    assert [len(tokens) for tokens, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([tokens for tokens, _ in batches]), windows.tokens)
    assert torch.equal(torch.cat([part for _, part in batches]), mask)
    assert windows.token_count == 9
    assert [part for _, part in Windows.of([[1], [2]]).batches(1)] == [None, None]
    with pytest.raises(InputError, match="at least one window"):
        windows.batches(0)


def test_the_fingerprint_covers_tokens_mask_and_shape():
    tokens = torch.arange(12)
    mask = torch.ones(3, 4, dtype=torch.bool)
    other = mask.clone()
    other[2, 3] = False
    made = [
        Windows.of(tokens.view(3, 4)),
        Windows.of(tokens.view(4, 3)),
        Windows.of(tokens.view(3, 4) + 1),
        Windows.of(tokens.view(3, 4), mask),
        Windows.of(tokens.view(3, 4), other),
    ]
    assert len({windows.fingerprint for windows in made}) == 5
    assert Windows.of(tokens.view(3, 4).int()).fingerprint == made[0].fingerprint
    kind, digest = made[0].fingerprint.split(":", 1)[1].split(":")
    assert kind == "sha256"
    assert len(digest) == 16


def test_describe_is_ready_for_json(tokenizer):
    windows = open_texts("python-stdlib", tokenizer, windows=2, seq_len=32, seed=3)
    described = json.loads(json.dumps(windows.describe()))
    assert described == {
        "source": "python-stdlib",
        "fingerprint": windows.fingerprint,
        "windows": 2,
        "seq_len": 32,
        "seed": 3,
        "bos": False,
        "notes": [],
    }


# Finished windows


def saved(path, array):
    np.save(path, array)
    return str(path)


def test_npy_windows_are_used_exactly_as_given(tmp_path, tokenizer):
    array = np.random.default_rng(0).integers(1, 4096, (7, 24), dtype=np.uint16)
    source = saved(tmp_path / "a.npy", array)
    model = {"vocab_size": 4096, "max_positions": 24}
    windows = open_texts(source, Reader(None, **model), windows=3, seq_len=512, bos="always")
    assert windows.tokens.tolist() == array.tolist()
    assert (windows.bos, windows.seed, windows.mask) == (False, None, None)
    assert windows.notes == ("used as given: 7 windows of 24 tokens",)
    assert windows.fingerprint.startswith("a.npy:sha256:")
    assert open_texts(source, tokenizer, windows=7, seq_len=24).notes == ()
    assert not open_texts(source, tokenizer).bos
    array[:, 0] = 0
    assert open_texts(saved(tmp_path / "b.npy", array), tokenizer).bos


@pytest.mark.parametrize(
    ("array", "settings", "message"),
    [
        (np.zeros(5, np.int64), {}, r"table \(windows, tokens\), not \(5,\)"),
        (np.zeros((0, 5), np.int64), {}, r"not \(0, 5\)"),
        (np.zeros((2, 5)), {}, "integers, not float64"),
        (np.full((2, 5), -1), {}, "negative"),
        (np.full((2, 5), 50), {"vocab_size": 50}, "token id 50, but the model knows only 50"),
        (np.zeros((2, 5), np.int32), {"max_positions": 4}, "have 5 tokens, the model has 4 positions"),
        (np.array([[None]]), {}, "cannot read .*a.npy"),
    ],
)
def test_npy_windows_are_checked(tmp_path, array, settings, message):
    with pytest.raises(InputError, match=message):
        open_texts(saved(tmp_path / "a.npy", array), Reader(None, **settings))


def test_npy_files_that_are_none(tmp_path, tokenizer):
    (tmp_path / "a.npy").write_bytes(b"text")
    for name in ("a.npy", "missing.npy"):
        with pytest.raises(InputError, match=f"cannot read .*{name}"):
            open_texts(str(tmp_path / name), tokenizer)

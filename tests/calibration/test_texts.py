"""Texts: where they come from, how they become windows, what is said when they cannot."""

import copy
import gzip
import hashlib
import json
import logging
import platform
import random
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import secateur
from secateur.calibration import local_files, sources
from secateur.calibration.sources import text_names
from secateur.calibration.texts import open_texts
from secateur.calibration.windows import Windows
from secateur.errors import InputError

BUNDLED = Path(next(iter(secateur.__path__))) / "bundled"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def starting_tokenizer(tokenizer):
    """The bundled tokenizer, changed to start texts with token 0, as those of Llama or Gemma do."""
    starting = copy.deepcopy(tokenizer)
    first = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    starting.backend_tokenizer.post_processor = first
    return starting


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def prose(number, words=40):
    """Give a document that no other number gives."""
    rng = random.Random(number)
    return f"document {number}: " + " ".join(rng.choices(["for", "x", "in", "range", "def"], k=words))


def write_lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def written_folder(path, count=12):
    for number in range(count):
        (path / f"{number:02}.txt").write_text(prose(number), encoding="utf-8")
    return str(path)


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


# The standard library


def test_the_standard_library_is_split_by_the_hash_of_the_module_name():
    for name in ("json", "asyncio.base_events", "this", "os"):
        assert sources.held_out(name) == (int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 < 3)
    modules = sources.stdlib_modules()
    share = sum(map(sources.held_out, modules)) / len(modules)
    assert 0.2 < share < 0.4


def test_the_standard_library_leaves_out_tests_and_what_is_installed():
    modules = sources.stdlib_modules()
    assert {"json", "json.decoder", "os", "email.mime.text"} <= modules.keys()
    assert modules["json"].name == "__init__.py"
    left_out = {"test", "tests", "idlelib", "site-packages", "ensurepip", "pydoc_data", "__phello__"}
    assert not [name for name in modules if left_out & set(name.split("."))]
    assert not [name for name in modules if name.startswith("_sysconfigdata") or "config-" in name]


def test_held_out_standard_library_is_one_text_in_hash_order(tokenizer):
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [name for name in sources.stdlib_modules() if sources.held_out(name)]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    paths = [root / (name.replace(".", "/") + ".py") for name in names[:40]]
    paths = [path if path.exists() else path.with_suffix("") / "__init__.py" for path in paths]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    ids = ids_of(tokenizer, "\n\n".join(text for text in texts if text.strip()))
    windows = open_texts("python-stdlib", tokenizer, windows=64, seq_len=256, split="held-out")
    assert torch.equal(windows.tokens, torch.tensor(ids[: 64 * 256]).view(64, 256))
    assert windows.seed is None
    label = f"python-stdlib(python {platform.python_version()}, held-out)"
    assert windows.fingerprint.startswith(f"{label}:sha256:")


def test_calibration_depends_on_the_seed_and_on_nothing_else(tokenizer):
    def opened(**changed):
        return open_texts("python-stdlib", tokenizer, **{"windows": 4, "seq_len": 64, "seed": 1} | changed)

    first, again, other = opened(), opened(), opened(seed=2)
    assert first.fingerprint == again.fingerprint
    assert torch.equal(first.tokens, again.tokens)
    assert first.fingerprint != other.fingerprint
    assert "(python " in first.fingerprint
    assert ", calibration)" in first.fingerprint
    held_out = [opened(split="held-out", seed=seed).fingerprint for seed in (1, 2)]
    assert held_out[0] == held_out[1]


def test_fewer_windows_are_the_first_of_more(tokenizer):
    few, many = (open_texts("python-stdlib", tokenizer, windows=count, seq_len=128) for count in (3, 40))
    assert torch.equal(few.tokens, many.tokens[:3])


def test_modules_that_are_not_utf8_are_left_out(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "good.py").write_text(prose(0), encoding="utf-8")
    (tmp_path / "bad.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n" * 50)
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(sources, "held_out", lambda name: False)
    windows = open_texts("python-stdlib", tokenizer, windows=None, seq_len=16)
    assert tokenizer.decode(windows.tokens.flatten()) in prose(0)


def test_a_python_without_sources_is_told(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    with pytest.raises(InputError, match="source of the standard library"):
        open_texts("python-stdlib", tokenizer)


# Text → windows


def test_text_is_tokenised_once_and_cut_without_overlap(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(prose(0, 300), encoding="utf-8")
    ids = ids_of(tokenizer, prose(0, 300))
    windows = open_texts(str(path), tokenizer, windows=None, seq_len=32)
    full, dropped = divmod(len(ids), 32)
    assert dropped
    assert torch.equal(windows.tokens, torch.tensor(ids[: full * 32]).view(full, 32))
    assert windows.notes == (f"last {dropped} tokens dropped",)
    assert windows.mask is None
    assert windows.fingerprint.startswith("a.txt:sha256:")


def test_fewer_windows_than_asked_are_kept_and_told(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(prose(0, 300), encoding="utf-8")
    full, dropped = divmod(len(ids_of(tokenizer, prose(0, 300))), 32)
    windows = open_texts(str(path), tokenizer, windows=100, seq_len=32)
    assert len(windows) == full
    assert windows.notes == (f"{full} windows instead of the 100 asked for", f"last {dropped} tokens dropped")
    enough = open_texts(str(path), tokenizer, windows=full, seq_len=32)
    assert enough.notes == ()
    assert torch.equal(enough.tokens, windows.tokens)


def test_documents_are_joined_with_blank_lines_and_calibration_is_shuffled(tmp_path, tokenizer):
    folder = written_folder(tmp_path)
    texts = [prose(number) for number in range(12)]
    for split in ("held-out", "calibration"):
        if split == "calibration":
            random.Random(7).shuffle(texts)
        ids = ids_of(tokenizer, "\n\n".join(texts))
        windows = open_texts(folder, tokenizer, windows=None, seq_len=16, seed=7, split=split)
        full = len(ids) // 16
        assert torch.equal(windows.tokens, torch.tensor(ids[: full * 16]).view(full, 16))


def test_empty_documents_do_not_count(tmp_path, tokenizer):
    items = [{"text": text} for text in ("", prose(1), " \n", None)]
    source = write_lines(tmp_path / "a.jsonl", items)
    alone = tmp_path / "b.txt"
    alone.write_text(prose(1), encoding="utf-8")
    settings = {"windows": None, "seq_len": 16, "split": "held-out"}
    opened = [open_texts(name, tokenizer, **settings) for name in (source, str(alone))]
    assert torch.equal(opened[0].tokens, opened[1].tokens)


def test_too_little_text_names_tokens_found_and_needed(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("def f(x): return x", encoding="utf-8")
    found = len(ids_of(tokenizer, "def f(x): return x"))
    with pytest.raises(InputError, match=f"a.txt: {found} tokens of text, one window needs 64.*--seq-len"):
        open_texts(str(path), tokenizer, seq_len=64)
    path.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="0 tokens of text"):
        open_texts(str(path), tokenizer, seq_len=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": 0}, "at least one window"),
        ({"seq_len": 7}, "7 tokens are too short.*at least 8"),
        ({"seq_len": 1024, "max_positions": 512}, "1024 .*512 positions"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"bos": "yes"}, "unknown setting for bos"),
        ({"vocab_size": 100}, "token id .* knows only 100"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(tokenizer, settings, message):
    with pytest.raises(InputError, match=message):
        open_texts("python-stdlib", tokenizer, **settings)


def test_without_a_tokenizer_there_are_no_windows():
    with pytest.raises(InputError, match="no tokenizer"):
        open_texts("python-stdlib", None)


def test_long_texts_give_no_warning():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)  # a fresh one: the warning comes once per tokenizer
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        open_texts("python-stdlib", tokenizer, windows=2)
        assert not records
        tokenizer("x " * 1000)
        assert "longer than" in records[0].getMessage()  # the handler does see it when it comes
    finally:
        logger.removeHandler(handler)


# The beginning-of-sequence token


def test_bos_auto_does_what_the_tokenizer_does(tokenizer, starting_tokenizer):
    for reader, expected in ((tokenizer, False), (starting_tokenizer, True)):
        windows = open_texts("python-stdlib", reader, windows=3, seq_len=32, split="held-out")
        assert windows.bos is expected
        assert (windows.tokens[:, 0] == 0).all().item() is expected


def test_bos_takes_one_place_of_each_window(tokenizer):
    settings = {"seq_len": 32, "split": "held-out"}
    with_bos = open_texts("python-stdlib", tokenizer, windows=32, bos="always", **settings)
    without = open_texts("python-stdlib", tokenizer, windows=31, bos="never", **settings)
    assert with_bos.tokens.shape == (32, 32)
    assert (with_bos.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(with_bos.tokens[:, 1:].flatten(), without.tokens.flatten())
    assert (with_bos.bos, without.bos) == (True, False)


def test_bos_never_wins_over_the_tokenizer(starting_tokenizer):
    windows = open_texts("python-stdlib", starting_tokenizer, windows=2, seq_len=32, bos="never")
    assert not windows.bos
    assert not (windows.tokens == 0).any()


def test_bos_always_needs_such_a_token(tokenizer):
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(InputError, match="no beginning-of-sequence token"):
        open_texts("python-stdlib", without, bos="always")
    assert not open_texts("python-stdlib", without, windows=1, seq_len=16).bos


# One document per window


def test_unpacked_documents_are_cut_or_padded(tmp_path, tokenizer):
    items = [{"text": prose(0, 200)}, {"text": "x = 1"}, {"text": prose(1, 5)}]
    source = write_lines(tmp_path / "a.jsonl", items)
    settings = {"windows": None, "seq_len": 64, "split": "held-out", "pack": False}
    windows = open_texts(source, tokenizer, **settings)
    long, short = ids_of(tokenizer, prose(0, 200)), ids_of(tokenizer, prose(1, 5))
    assert len(ids_of(tokenizer, "x = 1")) < 8 <= len(short) < 64 < len(long)
    assert windows.tokens.tolist() == [long[:64], short + [tokenizer.pad_token_id] * (64 - len(short))]
    assert windows.mask.tolist() == [[True] * 64, [place < len(short) for place in range(64)]]
    assert windows.token_count == 64 + len(short)
    assert windows.notes == ("1 document shorter than 8 tokens skipped",)
    with_bos = open_texts(source, tokenizer, bos="always", **settings)
    assert with_bos.tokens.tolist()[0] == [0, *long[:63]]
    assert with_bos.mask.sum(dim=1).tolist() == [64, len(short) + 1]


def test_the_shortest_windows_have_room_for_bos(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(prose(0), encoding="utf-8")
    for pack in (True, False):
        windows = open_texts(str(path), tokenizer, windows=1, seq_len=8, pack=pack, bos="always")
        assert windows.tokens.tolist() == [[0, *ids_of(tokenizer, prose(0))[:7]]]


def test_unpacked_calibration_is_shuffled_and_stops_early(tmp_path, tokenizer):
    folder = written_folder(tmp_path)
    order = list(range(12))
    random.Random(5).shuffle(order)
    windows = open_texts(folder, tokenizer, windows=4, seq_len=16, seed=5, pack=False)
    expected = [ids_of(tokenizer, prose(number))[:16] for number in order[:4]]
    assert windows.tokens.tolist() == expected
    assert windows.notes == ()
    fewer = open_texts(folder, tokenizer, windows=40, seq_len=16, pack=False)
    assert fewer.notes == ("12 windows instead of the 40 asked for",)


def test_unpacked_padding_falls_back_to_the_end_token_and_to_zero(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(prose(1, 5), encoding="utf-8")
    changed = copy.deepcopy(tokenizer)
    changed.pad_token, changed.eos_token = None, "def"
    opened = open_texts(str(path), changed, seq_len=64, pack=False)
    assert opened.tokens[0, -1] == changed.eos_token_id != 0
    changed.eos_token = None
    assert open_texts(str(path), changed, seq_len=64, pack=False).tokens[0, -1] == 0


def test_unpacked_documents_that_are_all_too_short_are_an_error(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y"}])
    with pytest.raises(InputError, match="2 documents, all shorter than 8 tokens"):
        open_texts(source, tokenizer, pack=False)


# Local files


CHAT = [{"role": "user", "content": prose(0)}, {"role": "assistant", "content": prose(1)}]


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"text": prose(0), "title": "no"}, prose(0)),
        ({"body": prose(0), "id": 3}, prose(0)),
        ({"title": "no", "content": prose(0)}, prose(0)),
        (
            {"instruction": prose(0), "input": "", "output": prose(1), "id": "no"},
            f"{prose(0)}\n{prose(1)}",
        ),
        (
            {"instruction": prose(0), "input": prose(2), "output": prose(1)},
            "\n".join(map(prose, (0, 2, 1))),
        ),
        ({"messages": CHAT, "id": "no"}, f"{prose(0)}\n{prose(1)}"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json-lines", "parquet"])
def test_the_text_field_of_a_row(tmp_path, tokenizer, suffix, item, text):
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([item]), path)
    else:
        write_lines(path, [item])
    windows = open_texts(str(path), tokenizer, windows=None, seq_len=8)
    ids = ids_of(tokenizer, text)
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 8 * 8]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"title": "a", "body": "b"}', "a.jsonl, line 1: which field is the text. Found title, body"),
        ('{"instruction": "a", "response": "b"}', "Found instruction, response"),
        ("{}", "Found none"),
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: a list"),
        ('{"text": "a"}\n{"text": 3}', "line 2: field 'text' is of type int"),
        ('{"text": "a"}\n{"body": "b"}', "line 2: no field 'text'; found body"),
        ('{"messages": [{"content": 3}]}', "field 'messages.content' is of type int"),
    ],
)
def test_a_line_without_text_is_named(tmp_path, tokenizer, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        open_texts(str(path), tokenizer)


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path, tokenizer):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.md").write_text(prose(1), encoding="utf-8")
    (tmp_path / "a.txt").write_text(prose(0), encoding="utf-8")
    write_lines(tmp_path / "c.jsonl", [{"text": prose(2)}, {"text": prose(3)}])
    pq.write_table(pa.table({"text": [prose(4), prose(5)]}), tmp_path / "d.parquet")
    (tmp_path / "b" / "ignored.csv").write_text("not read", encoding="utf-8")
    windows = open_texts(str(tmp_path), tokenizer, windows=None, seq_len=8, split="held-out")
    ids = ids_of(tokenizer, "\n\n".join(map(prose, range(6))))
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 8 * 8]


def test_what_cannot_be_read_is_an_error_with_advice(tmp_path, tokenizer):
    (tmp_path / "latin.txt").write_bytes("été ".encode("latin-1") * 100)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "a.csv").write_text("a,b", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("latin.txt", "latin.txt is not UTF-8 text.*iconv"),
        ("bad.parquet", "bad.parquet is not a readable parquet file"),
        ("a.csv", r"cannot read text from .*a.csv: known are .txt, .md"),
        ("empty", "nothing to read in .*empty"),
    ):
        with pytest.raises(InputError, match=message):
            open_texts(str(tmp_path / name), tokenizer)
    with pytest.raises(InputError, match=r"cannot read .*check the file"):
        list(local_files._whole_file(tmp_path / "missing.txt"))


def test_files_are_read_no_further_than_needed(tmp_path, tokenizer):
    good = "".join(json.dumps({"text": prose(number)}) + "\n" for number in range(2000))
    path = tmp_path / "a.jsonl"
    path.write_text(good + "broken", encoding="utf-8")
    windows = open_texts(str(path), tokenizer, windows=4, seq_len=64, split="held-out")
    assert len(windows) == 4
    with pytest.raises(InputError, match="line 2001: not JSON"):
        open_texts(str(path), tokenizer, windows=None, seq_len=64, split="held-out")


def test_text_that_needs_more_characters_than_guessed_is_read_on(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    text = (" " * 400 + "x\n") * 500  # many characters to a token
    path.write_text(text, encoding="utf-8")
    ids = ids_of(tokenizer, text)
    windows = open_texts(str(path), tokenizer, windows=len(ids) // 16 - 8, seq_len=16)
    assert len(text) / len(ids) > 8
    assert windows.tokens.flatten().tolist() == ids[: (len(ids) // 16 - 8) * 16]


def test_a_pool_shuffles_everything_and_holds_little():
    held = []
    numbers = [str(number) for number in range(1000)]

    def counted():
        for number, text in enumerate(numbers):
            held.append(number)
            yield text

    stream = sources._shuffled(counted(), seed=0, documents=50)
    first = next(stream)
    assert len(held) == 51
    rest = list(stream)
    assert sorted([first, *rest]) == sorted(numbers)
    assert [first, *rest] != numbers
    assert [first, *rest] == list(sources._shuffled(iter(numbers), seed=0, documents=50))
    expected = list(numbers)
    random.Random(3).shuffle(expected)
    assert list(sources._shuffled(iter(numbers), seed=3)) == expected


def test_a_pool_is_also_bounded_in_characters():
    texts = ["x" * length for length in [1] * 200 + [50] * 200 + [1] * 200]
    taken = []
    stream = sources._shuffled((taken.append(text) or text for text in texts), seed=0, characters=100)
    given = []
    for text in stream:
        given.append(text)
        held = sum(map(len, taken)) - sum(map(len, given))
        assert held <= 100 + 50
        assert held > 40 or len(taken) == len(texts)
    assert sorted(given) == sorted(texts)


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    for name, text in (("a.txt", prose(0)), ("b.jsonl", json.dumps({"text": prose(0)}))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        windows = open_texts(str(tmp_path / name), tokenizer, windows=1, seq_len=16)
        assert windows.tokens.tolist() == [ids_of(tokenizer, prose(0))[:16]]


def test_unknown_names_list_the_known_ones(tokenizer):
    message = r"unknown text 'wikitex2'. Did you mean 'wikitext2'.*python-stdlib.*of your own"
    with pytest.raises(InputError, match=message):
        open_texts("wikitex2", tokenizer)


def test_a_path_with_a_colon_or_a_comma_is_a_path(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:0.5.txt", "a,b.txt"):
        Path(name).write_text(prose(0), encoding="utf-8")
        assert open_texts(name, tokenizer, windows=None, seq_len=8).fingerprint.startswith(f"{name}:sha256:")


def test_a_name_goes_before_a_folder_of_that_name(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("python-stdlib").mkdir()
    assert "(python " in open_texts("python-stdlib", tokenizer, windows=1, seq_len=16).fingerprint


# Finished windows


def saved(path, array):
    np.save(path, array)
    return str(path)


def test_npy_windows_are_used_exactly_as_given(tmp_path, tokenizer):
    array = np.random.default_rng(0).integers(1, 4096, (7, 24), dtype=np.uint16)
    source = saved(tmp_path / "a.npy", array)
    model = {"vocab_size": 4096, "max_positions": 24}
    windows = open_texts(source, None, windows=3, seq_len=512, bos="always", **model)
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
        open_texts(saved(tmp_path / "a.npy", array), None, **settings)


def test_npy_files_that_are_none(tmp_path, tokenizer):
    (tmp_path / "a.npy").write_bytes(b"text")
    for name in ("a.npy", "missing.npy"):
        with pytest.raises(InputError, match=f"cannot read .*{name}"):
            open_texts(str(tmp_path / name), tokenizer)


# Mixtures


@pytest.fixture
def two_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, letter in (("a.txt", "a"), ("b.txt", "b")):
        Path(name).write_text(f" {letter}" * 3000, encoding="utf-8")


def shares_of(windows, tokenizer):
    a = ids_of(tokenizer, " a")[0]
    return int((windows.tokens[:, 1] == a).sum()), int((windows.tokens[:, 1] != a).sum())


@pytest.mark.parametrize(
    ("source", "windows", "counts"),
    [
        ("a.txt:0.7,b.txt:0.3", 10, (7, 3)),
        ("a.txt:7,b.txt:3", 10, (7, 3)),
        ("a.txt, b.txt", 10, (5, 5)),
        ("a.txt,b.txt", 9, (5, 4)),
        ("a.txt:0.74,b.txt:0.26", 10, (7, 3)),
        ("a.txt:0.999,b.txt:0.001", 10, (9, 1)),
        ("a.txt:1e-9,b.txt:1", 2, (1, 1)),
    ],
)
@pytest.mark.usefixtures("two_files")
def test_weights_are_shares_of_the_windows(tokenizer, source, windows, counts):
    mixed = open_texts(source, tokenizer, windows=windows, seq_len=16)
    assert shares_of(mixed, tokenizer) == counts
    assert mixed.source == source


def test_apportioning_three_parts_by_largest_remainder():
    from secateur.calibration.texts import _apportion

    assert _apportion([0.5, 0.3, 0.2], 7) == [4, 2, 1]
    assert _apportion([1 / 3] * 3, 8) == [3, 3, 2]
    assert _apportion([0.98, 0.01, 0.01], 5) == [3, 1, 1]


@pytest.mark.usefixtures("two_files")
def test_calibration_mixes_the_parts_and_held_out_keeps_their_order(tokenizer):
    def firsts(**settings):
        return open_texts("a.txt,b.txt", tokenizer, windows=20, seq_len=16, **settings).tokens[:, 1].tolist()

    in_order = firsts(split="held-out")
    assert in_order == [in_order[0]] * 10 + [in_order[-1]] * 10
    assert firsts(seed=1) == firsts(seed=1) != in_order
    assert sorted(firsts(seed=1)) == sorted(in_order)


@pytest.mark.usefixtures("two_files")
def test_a_mixture_names_its_parts(tokenizer):
    mixed = open_texts("a.txt:3,b.txt:1", tokenizer, windows=800, seq_len=16)
    assert mixed.fingerprint.startswith("a.txt:0.75,b.txt:0.25:sha256:")
    assert "a.txt: 187 windows instead of the 600 asked for" in mixed.notes
    assert len(mixed) == 187 + 187
    assert mixed.seed == 0


@pytest.mark.usefixtures("two_files")
def test_an_unpacked_mixture_keeps_masks_with_their_windows(tokenizer):
    Path("a.jsonl").write_text('{"text": "a a a a a a a a a a a a"}\n' * 6, encoding="utf-8")
    Path("b.jsonl").write_text('{"text": "b b b b b b b b b b b b b b b b b b b"}\n' * 6, encoding="utf-8")
    mixed = open_texts("a.jsonl,b.jsonl", tokenizer, windows=12, seq_len=32, pack=False, seed=1)
    b = ids_of(tokenizer, " b")[0]
    assert ((mixed.tokens == b).sum(dim=1) > 0).tolist() == (mixed.mask.sum(dim=1) > 15).tolist()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a.txt:0,b.txt:1", "weight '0' of 'a.txt' is not a positive number"),
        ("a.txt:-1,b.txt:1", "weight '-1'"),
        ("a.txt:nan,b.txt:1", "weight 'nan'"),
        ("a.txt:inf,b.txt:1", "weight 'inf'"),
        ("a.txt:much,b.txt:1", "weight 'much'"),
        ("a.txt:0.5,b.txt", "to some texts only"),
        ("a.txt,,b.txt", "empty part"),
        (":1,b.txt:1", "empty part"),
        ("", "empty part"),
        ("a.txt:1,a.txt:2", "twice"),
        ("a.txt:1,nothing:1", "unknown text 'nothing'"),
        ("a.txt:1,w.npy:1", "w.npy holds finished windows"),
        ("a.txt,b.txt,python-stdlib", "2 windows are too few for a mixture of 3"),
    ],
)
@pytest.mark.usefixtures("two_files")
def test_mixtures_that_make_no_sense_are_refused(tokenizer, source, message):
    with pytest.raises(InputError, match=message):
        open_texts(source, tokenizer, windows=2, seq_len=16)


@pytest.mark.usefixtures("two_files")
def test_a_mixture_needs_a_number_of_windows(tokenizer):
    with pytest.raises(InputError, match="so give one"):
        open_texts("a.txt,b.txt", tokenizer, windows=None)


@pytest.mark.usefixtures("two_files")
def test_a_single_weighted_name_is_that_name(tokenizer):
    opened = [open_texts(source, tokenizer, windows=2, seq_len=16) for source in ("a.txt:0.4", "a.txt")]
    assert torch.equal(opened[0].tokens, opened[1].tokens)


# The hub, played by local data sets


@pytest.fixture
def hub(monkeypatch):
    """Let `datasets.load_dataset` return rows of ours; gives what it was asked for."""
    asked = []

    def play(rows_of_split, pieces=1):
        def load_dataset(path, name=None, *, data_files=None, split, streaming):
            asked.append({"path": path, "name": name, "data_files": data_files, "split": split})
            rows = datasets.Dataset.from_list([{"text": text, "other": 1} for text in rows_of_split[split]])
            return rows.to_iterable_dataset(num_shards=pieces) if streaming else rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return play


def article(n):
    """Give the rows of one article as WikiText has them."""
    return [
        "",
        f" = Title {n} = \n",
        "",
        f" {prose(n)} \n",
        "",
        f" = = Part {n} = = \n",
        f" {prose(n + 100)} \n",
    ]


LINES = [line for n in range(6) for line in article(n)]


def test_wikitext_is_the_published_text(tokenizer, hub):
    asked = hub({"train": [], "test": LINES})
    windows = open_texts("wikitext2", tokenizer, windows=None, seq_len=16, split="held-out")
    ids = ids_of(tokenizer, "\n\n".join(LINES))
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert asked[0]["path"] == "Salesforce/wikitext"
    assert asked[0]["name"] == "wikitext-2-raw-v1"
    assert windows.fingerprint.startswith("wikitext2(held-out):sha256:")


@pytest.mark.parametrize("name", ["wikitext2", "wikitext103"])
def test_wikitext_calibration_shuffles_articles_not_lines(tokenizer, hub, name):
    hub({"train": LINES, "test": []})
    windows = open_texts(name, tokenizer, windows=1000, seq_len=8, seed=2)
    text = tokenizer.decode(windows.tokens.flatten())
    numbers = [int(title.split()[0]) for title in text.split(" = Title ")[1:]]
    assert sorted(numbers) == list(range(6))
    assert numbers != sorted(numbers)
    for n in numbers[:-1]:
        assert "\n\n".join(article(n)[1:]).strip() in text


@pytest.mark.parametrize(
    ("name", "splits"),
    [("c4", ("train", "validation")), ("slimpajama", ("train", "test")), ("pg19", ("train", "test"))],
)
def test_streams_with_splits(tokenizer, hub, name, splits):
    train, held_out = splits
    asked = hub({train: [prose(n) for n in range(60)], held_out: [prose(n) for n in range(60, 90)]}, pieces=3)
    settings = {"windows": 6, "seq_len": 16, "pack": False}
    first, again, other = (open_texts(name, tokenizer, seed=seed, **settings) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    calibration = {tuple(row) for row in first.tokens.tolist()}
    assert calibration <= {tuple(ids_of(tokenizer, prose(n))[:16]) for n in range(60)}
    ordered = open_texts(name, tokenizer, split="held-out", **settings)
    assert ordered.tokens.tolist() == [ids_of(tokenizer, prose(n))[:16] for n in range(60, 66)]
    assert [request["split"] for request in asked] == [train, train, train, held_out]
    if name == "c4":
        assert asked[0]["data_files"] == {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        }


def test_books_give_one_excerpt_each(tokenizer, hub):
    hub({"train": [" ".join(f"{n}w{i}" for i in range(20_000)) for n in range(5)], "test": []})
    windows = open_texts("pg19", tokenizer, windows=20_000, seq_len=8)
    assert 5 * 19_000 < len(tokenizer.decode(windows.tokens.flatten())) <= 5 * 20_002
    assert "one excerpt of 20000 characters of each document of pg19" in windows.notes


@pytest.mark.parametrize("name", ["alpaca", "bookcorpus"])
def test_a_held_out_split_by_hash_is_disjoint_and_complete(tokenizer, hub, name):
    per_document = 64 if name == "bookcorpus" else 1
    rows = [f"row {n} of the data set, long enough to count" for n in range(50 * per_document)]
    hub({"train": rows})
    opened = {
        split: open_texts(name, tokenizer, windows=1000, seq_len=4096, split=split, pack=False)
        for split in ("calibration", "held-out")
    }
    texts = {
        split: [tokenizer.decode(row[real]) for row, real in zip(windows.tokens, windows.mask, strict=True)]
        for split, windows in opened.items()
    }
    documents = [" ".join(rows[n : n + per_document]) for n in range(0, len(rows), per_document)]
    assert texts["held-out"] == [text for n, text in enumerate(documents) if sources.held_out(str(n))]
    assert sorted(texts["held-out"] + texts["calibration"]) == sorted(documents)
    assert texts["calibration"] != [text for n, text in enumerate(documents) if not sources.held_out(str(n))]
    for windows in opened.values():
        assert any("no held-out split" in note for note in windows.notes)


def test_streams_are_not_read_to_the_end(tokenizer, monkeypatch):
    read = []

    def rows():
        for number in range(10_000):
            read.append(number)
            yield {"text": prose(number)}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    assert len(open_texts("c4", tokenizer, windows=4, seq_len=64, split="held-out")) == 4
    assert len(read) < 100


@pytest.mark.parametrize("name", ["c4", "bookcorpus", "wikitext103"])
def test_large_data_sets_are_not_taken_whole(tokenizer, name):
    with pytest.raises(InputError, match="too large to be taken whole"):
        open_texts(name, tokenizer, windows=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "cannot reach the hub for alpaca .*no route.*python-stdlib"),
        (FileNotFoundError("no such data set"), "cannot load alpaca .*no such data set.*local file"),
        (datasets.exceptions.DatasetGenerationError("broken"), "cannot load alpaca .*broken"),
    ],
)
def test_hub_troubles_say_what_else_to_do(tokenizer, monkeypatch, error, message):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=message):
        open_texts("alpaca", tokenizer)


def test_a_connection_lost_while_reading_is_told(tokenizer, monkeypatch):
    from huggingface_hub.errors import HTTPError

    class Broken:
        def __iter__(self):
            yield {"text": prose(0)}
            raise HTTPError("lost")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Broken())
    with pytest.raises(InputError, match=r"cannot reach the hub for c4 .*lost"):
        open_texts("c4", tokenizer, split="held-out")


def test_a_data_set_that_changed_its_columns_is_told(tokenizer, monkeypatch):
    changed = datasets.Dataset.from_list([{"prompt": "a"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: changed)
    with pytest.raises(InputError, match="tatsu-lab/alpaca: no field 'text'; found prompt"):
        open_texts("alpaca", tokenizer)


def test_text_names_describe_every_source():
    named = {text.name: text for text in text_names()}
    assert list(named) == [
        "python-stdlib", "wikitext2", "wikitext103", "c4", "alpaca", "slimpajama", "pg19", "bookcorpus",
    ]  # fmt: skip
    assert (named["wikitext2"].calibration, named["wikitext2"].held_out) == ("train", "test")
    assert named["wikitext2"].origin == "Salesforce/wikitext (wikitext-2-raw-v1)"
    assert "7 of 10" in named["alpaca"].calibration
    assert all(text.origin and text.calibration and text.held_out for text in named.values())


def test_local_text_does_not_need_the_data_sets_library(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it now fails
    assert open_texts(written_folder(tmp_path), tokenizer, windows=2, seq_len=16).tokens.shape == (2, 16)
    with pytest.raises(ImportError):
        open_texts("alpaca", tokenizer)


def test_the_real_library_streams_what_we_ask_for(tmp_path, tokenizer, monkeypatch):
    for number in range(3):
        lines = "".join(json.dumps({"text": prose(10 * number + n)}) + "\n" for n in range(10))
        (tmp_path / f"train-{number}.json.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"text": [prose(100), prose(101)]}), tmp_path / "test.parquet")
    rows = {
        "c4": replace(sources.HUB["c4"], path=str(tmp_path), data_files={"train": "train-*.json.gz"}),
        "slimpajama": replace(sources.HUB["slimpajama"], path=str(tmp_path), data_files={"test": "test.parquet"}),
    }
    monkeypatch.setattr(sources, "HUB", rows)
    settings = {"windows": 30, "seq_len": 16, "pack": False}
    calibration, again = (open_texts("c4", tokenizer, seed=1, **settings) for _ in range(2))
    all_of_it = [ids_of(tokenizer, prose(n))[:16] for n in range(30)]
    assert sorted(calibration.tokens.tolist()) == sorted(all_of_it)
    assert calibration.tokens.tolist() != all_of_it
    assert calibration.fingerprint == again.fingerprint
    held_out = open_texts("slimpajama", tokenizer, split="held-out", **settings)
    assert held_out.tokens.tolist() == [ids_of(tokenizer, prose(n))[:16] for n in (100, 101)]

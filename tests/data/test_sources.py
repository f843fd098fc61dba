"""Where texts come from: the standard library, files, the hub; and what is said when they cannot be had."""

import csv
import gzip
import hashlib
import json
import platform
import random
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sample_texts import ids_of, prose, write_lines, written_folder
from secateur.data import interpreter, local_files, sources
from secateur.data.documents import held_out, shuffled
from secateur.data.hub import HUB
from secateur.data.local_files import stamp_of
from secateur.data.sources import open_rows, text_names
from secateur.data.texts import open_texts
from secateur.errors import InputError

# The standard library


def test_the_standard_library_is_split_by_the_hash_of_the_module_name():
    for name in ("json", "asyncio.base_events", "this", "os"):
        assert held_out(name) == (int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 < 3)
    modules = interpreter.stdlib_modules()
    share = sum(map(held_out, modules)) / len(modules)
    assert 0.2 < share < 0.4


def test_the_standard_library_leaves_out_tests_and_what_is_installed():
    modules = interpreter.stdlib_modules()
    assert {"json", "json.decoder", "os", "email.mime.text"} <= modules.keys()
    assert modules["json"].name == "__init__.py"
    left_out = {"test", "tests", "idlelib", "site-packages", "ensurepip", "pydoc_data", "__phello__"}
    assert not [name for name in modules if left_out & set(name.split("."))]
    assert not [name for name in modules if name.startswith("_sysconfigdata") or "config-" in name]


def test_held_out_standard_library_is_one_text_in_hash_order(tokenizer):
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [name for name in interpreter.stdlib_modules() if held_out(name)]
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
    monkeypatch.setattr(interpreter.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(interpreter, "held_out", lambda name: False)
    windows = open_texts("python-stdlib", tokenizer, windows=None, seq_len=16)
    assert tokenizer.decode(windows.tokens.flatten()) in prose(0)


def test_a_python_without_sources_is_told(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(interpreter.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    with pytest.raises(InputError, match="source of the standard library"):
        open_texts("python-stdlib", tokenizer)


# Local files


CHAT = [{"role": "user", "content": prose(0)}, {"role": "assistant", "content": prose(1)}]
SHARED = [{"from": "human", "value": prose(0)}, {"from": "gpt", "value": prose(1)}]


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
        ({"conversations": SHARED, "id": "no"}, f"{prose(0)}\n{prose(1)}"),
        ({"id": "no", "prompt": prose(0), "response": prose(1)}, f"{prose(0)}\n{prose(1)}"),
        ({"question": prose(0), "answer": prose(1), "topic": "no"}, f"{prose(0)}\n{prose(1)}"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json-lines", "parquet", "json"])
def test_the_text_field_of_a_row(tmp_path, tokenizer, suffix, item, text):
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([item]), path)
    elif suffix == "json":
        path.write_text(json.dumps([item], indent=1), encoding="utf-8")
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


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (["id", "body"], r"a.csv: which field is the text\? Found id, body; rename"),
        ([], "too little text"),
    ],
)
def test_a_csv_file_without_a_text_column_is_told(tmp_path, tokenizer, header, message):
    path = tmp_path / "a.csv"
    path.write_text(",".join(header) + "\n" + "1,words\n" * bool(header), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        open_texts(str(path), tokenizer)


@pytest.mark.parametrize("names", [("text", "id"), ("prompt", "response"), ("content", "title")])
def test_columns_of_a_csv_file(tmp_path, tokenizer, names):
    path = tmp_path / "a.csv"
    long = prose(1, words=40_000)  # longer than the csv module takes unless told to
    with path.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows([names, (prose(0) + '\n"quoted", twice', "7"), (long, "8")])
    windows = open_texts(str(path), tokenizer, windows=None, seq_len=16, split="held-out")
    assert tokenizer.decode(windows.tokens.flatten()).startswith(prose(0) + '\n"quoted", twice')
    assert windows.tokens.numel() > 40_000
    assert next(iter(open_rows(str(path), 0)))[names[1]] == "7"


def test_a_json_file_that_is_torn(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n{"text"', encoding="utf-8")
    with pytest.raises(InputError, match=r"a.json, line 2: not JSON"):
        open_texts(str(path), tokenizer)
    path.write_text('["text"]', encoding="utf-8")
    with pytest.raises(InputError, match="entry 1: a str; each entry must be an object"):
        open_texts(str(path), tokenizer)


def test_a_json_file_of_lines(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.json", [{"text": prose(0)}, {"text": prose(1)}])
    windows = open_texts(path, tokenizer, windows=None, seq_len=8, split="held-out")
    assert tokenizer.decode(windows.tokens[0]) in prose(0)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["txt", "csv", "json", "jsonl"])
def test_texts_in_other_encodings_are_told_by_their_mark(tmp_path, tokenizer, encoding, suffix):
    written = {
        "txt": prose(0),
        "csv": f"text\n{prose(0)}\n",
        "json": json.dumps([{"text": prose(0)}]),
        "jsonl": json.dumps({"text": prose(0)}),
    }[suffix]
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes((mark + written).encode(encoding))
    windows = open_texts(str(path), tokenizer, windows=None, seq_len=8)
    assert tokenizer.decode(windows.tokens.flatten()) in prose(0)


def test_tables_in_a_folder_are_read_only_where_there_is_nothing_else(tmp_path, tokenizer):
    (tmp_path / "settings.json").write_text('{"a": 1}', encoding="utf-8")
    (tmp_path / "a.txt").write_text(prose(0), encoding="utf-8")
    assert open_texts(str(tmp_path), tokenizer, windows=1, seq_len=16).tokens.numel() == 16
    (tmp_path / "a.txt").unlink()
    (tmp_path / "settings.json").write_text(json.dumps([{"text": prose(0)}]), encoding="utf-8")
    assert open_texts(str(tmp_path), tokenizer, windows=1, seq_len=16).tokens.numel() == 16


def test_half_a_character_is_told(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(prose(0).encode("utf-16")[:-1])
    with pytest.raises(InputError, match="is not UTF-8 text"):
        open_texts(str(path), tokenizer)


# The manual


def test_the_manual_is_split_by_the_hash_of_the_topic(tokenizer):
    topics = interpreter.manual_topics()
    held = [name for name in topics if held_out(name)]
    assert 0.1 < len(held) / len(topics) < 0.5
    windows = open_texts("python-docs", tokenizer, windows=None, seq_len=32, split="held-out")
    first = min(held, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert tokenizer.decode(windows.tokens.flatten()).startswith(topics[first][:500])
    assert windows.fingerprint.startswith(f"python-docs(python {platform.python_version()}, held-out):sha256:")


def test_what_is_held_out_of_the_manual_is_nowhere_in_the_other_part():
    parts = {
        split: sources.open_documents("python-docs", split, 0, whole=True) for split in ("calibration", "held-out")
    }
    calibration, held = ({piece for text in part.texts for piece in text.split("\n\n")} for part in parts.values())
    assert not {piece for piece in calibration & held if len(piece) > 40}
    assert sum(map(len, calibration)) > 200_000


def test_topics_for_calibration_are_shuffled(tokenizer):
    one, same, other = (open_texts("python-docs", tokenizer, windows=2, seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_a_python_without_its_manual_is_told(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="python-docs: this Python comes without its manual"):
        open_texts("python-docs", tokenizer)


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
    (tmp_path / "a.xml").write_text("a,b", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("latin.txt", "latin.txt is not UTF-8 text.*iconv"),
        ("bad.parquet", "bad.parquet is not a readable parquet file"),
        ("a.xml", r"cannot read text from .*a.xml: known are .txt, .md"),
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

    stream = shuffled(counted(), seed=0, documents=50)
    first = next(stream)
    assert len(held) == 51
    rest = list(stream)
    assert sorted([first, *rest]) == sorted(numbers)
    assert [first, *rest] != numbers
    assert [first, *rest] == list(shuffled(iter(numbers), seed=0, documents=50))
    expected = list(numbers)
    random.Random(3).shuffle(expected)
    assert list(shuffled(iter(numbers), seed=3)) == expected


def test_a_pool_is_also_bounded_in_characters():
    texts = ["x" * length for length in [1] * 200 + [50] * 200 + [1] * 200]
    taken = []
    stream = shuffled((taken.append(text) or text for text in texts), seed=0, characters=100)
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


def test_the_stamp_of_a_source_is_of_its_local_files_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert stamp_of("wikitext2") == stamp_of("wikitext2:0.5,alpaca:0.5") == stamp_of(None) == []
    before = stamp_of("notes:0.5,b.txt:0.5")
    assert [(name, size) for name, size, _ in before] == [("notes/a.txt", 3), ("b.txt", 3)]
    (tmp_path / "b.txt").write_text("three")
    assert stamp_of("notes:0.5,b.txt:0.5") != before
    assert stamp_of("notes") == before[:1]


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


# The hub, played by local data sets


@pytest.fixture
def hub(monkeypatch):
    """Let `datasets.load_dataset` return rows of ours; gives what it was asked for."""
    asked = []

    def play(rows_of_split, pieces=1):
        def load_dataset(path, name=None, *, data_files=None, split, streaming, revision):
            asked.append({"path": path, "name": name, "data_files": data_files, "split": split, "revision": revision})
            made = [text if isinstance(text, dict) else {"text": text, "other": 1} for text in rows_of_split[split]]
            rows = datasets.Dataset.from_list(made)
            return rows.to_iterable_dataset(num_shards=pieces) if streaming else rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return play


def article(n):
    """Return the rows of one article as WikiText has them."""
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


def test_ptb_is_its_sentences_from_the_conversion_to_parquet(tokenizer, hub):
    sentences = [{"sentence": f"no {n} it was n't <unk> monday"} for n in range(90)]
    asked = hub({"validation": sentences})
    windows = open_texts("ptb", tokenizer, windows=2, seq_len=32, split="held-out")
    assert asked[-1]["split"] == "validation"
    assert asked[-1]["revision"] == "refs/convert/parquet"
    assert asked[-1]["data_files"]["validation"] == "penn_treebank/validation/*.parquet"
    text = "\n\n".join(one["sentence"] for one in sentences)
    assert (
        tokenizer.decode(windows.tokens[0], skip_special_tokens=True)
        == text[: len(tokenizer.decode(windows.tokens[0], skip_special_tokens=True))]
    )


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
    assert texts["held-out"] == [text for n, text in enumerate(documents) if held_out(str(n))]
    assert sorted(texts["held-out"] + texts["calibration"]) == sorted(documents)
    assert texts["calibration"] != [text for n, text in enumerate(documents) if not held_out(str(n))]
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
        "python-stdlib", "python-docs", "self", "diverse",
        "wikitext2", "wikitext103", "c4", "alpaca", "alpaca-cleaned", "slimpajama", "pg19", "pg19-validation",
        "bookcorpus", "ptb",
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
        "c4": replace(HUB["c4"], path=str(tmp_path), data_files={"train": "train-*.json.gz"}),
        "slimpajama": replace(HUB["slimpajama"], path=str(tmp_path), data_files={"test": "test.parquet"}),
    }
    for name, row in rows.items():
        monkeypatch.setitem(HUB, name, row)
    settings = {"windows": 30, "seq_len": 16, "pack": False}
    calibration, again = (open_texts("c4", tokenizer, seed=1, **settings) for _ in range(2))
    all_of_it = [ids_of(tokenizer, prose(n))[:16] for n in range(30)]
    assert sorted(calibration.tokens.tolist()) == sorted(all_of_it)
    assert calibration.tokens.tolist() != all_of_it
    assert calibration.fingerprint == again.fingerprint
    held_out = open_texts("slimpajama", tokenizer, split="held-out", **settings)
    assert held_out.tokens.tolist() == [ids_of(tokenizer, prose(n))[:16] for n in (100, 101)]

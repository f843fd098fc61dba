"""Documents in local files: text, Markdown, JSON, JSON lines, CSV, parquet, and folders of these."""

import codecs
import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import InputError, first_line
from secateur.reading import from_json

LINES = (".jsonl", ".json-lines", ".jsonlines", ".ndjson")
TABLES = (".json", ".csv")
ROWS = (*LINES, *TABLES, ".parquet")
READABLE = (".txt", ".md", *ROWS)

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins like UTF-16 and has to be looked for first
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"))
"""Fields that together form one text, in this order."""
_WHOLE = (".txt", ".md", ".json")
_LARGEST = 4 << 30
_LONGEST_LINE = 256 << 20
"""Maximum characters in a line of JSON."""
_LONGEST_FIELD = 1 << 30
"""Maximum characters in a field of a CSV file; the csv module's own limit is 131,072."""


def local_documents(path: Path) -> Iterator[str]:
    """Return the documents of a file, or of all files in a folder and below, in the order of their names.

    JSON and CSV files of a folder are read only if there is nothing else: they are settings as often as texts.

    Raises:
        InputError: nothing readable; later, while documents are taken, a file that cannot be read.
    """
    if not path.is_dir():
        return _file_documents(path)
    inside = sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
    files = [file for file in inside if file.suffix.lower() in READABLE and file.is_file()]
    files = [file for file in files if file.suffix.lower() not in TABLES] or files
    if not files:
        raise InputError(f"nothing to read in {path}: no {', '.join(READABLE)} in it or below")
    return (text for file in files for text in _file_documents(file))


def stamp_of(source: str | None) -> list[tuple[str, int, int]]:
    """Return name, size and time of every local file that a text source names; nothing for other sources."""
    found: list[tuple[str, int, int]] = []
    whole = bool(source) and Path(source or "").expanduser().exists()
    for part in [source or ""] if whole else (source or "").split(","):
        names = (part.strip(), part.rpartition(":")[0].strip())  # the second where a weight follows the name
        path = next((Path(name).expanduser() for name in names if name and Path(name).expanduser().exists()), None)
        if path is None:
            continue
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        of_files = ((file, file.stat()) for file in files if file.is_file())
        found += [(file.as_posix(), at.st_size, at.st_mtime_ns) for file, at in of_files]
    return found


def _file_documents(path: Path) -> Iterator[str]:
    kind = path.suffix.lower()
    if kind in (".txt", ".md"):
        return _whole_file(path)
    if kind in (*LINES, *TABLES):
        return _documents_in(_placed_rows(path))
    if kind == ".parquet":
        return _parquet(path)
    raise InputError(f"cannot read text from {path}: known are {', '.join(READABLE)}, .npy and folders")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    if path.exists() and not path.is_file():
        raise InputError(f"cannot read {path}: not an ordinary file; give a file or a folder of files")
    if path.suffix.lower() in _WHOLE and path.exists() and path.stat().st_size > _LARGEST:
        raise InputError(
            f"{path}: files of this kind are read as a whole, up to {_LARGEST >> 30} GiB; split it, or write .jsonl"
        )
    try:
        yield
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        advice = f"convert it, for example with: iconv -f latin1 -t utf-8 {path.name}"
        raise InputError(f"{path} is not UTF-8 text ({reason}); {advice}") from error
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot read {path}: {reason}; check the file and its permissions") from error


def _encoding(path: Path) -> str:
    """Return the encoding of a text by its byte order mark; UTF-8 if there is none."""
    with path.open("rb") as stream:
        start = stream.read(4)
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")


def _whole_file(path: Path) -> Iterator[str]:
    with _reading(path):
        yield path.read_text(encoding=_encoding(path))


Placed = tuple[str, dict[str, Any]]
"""A row, and its location."""


def _documents_in(rows: Iterator[Placed]) -> Iterator[str]:
    fields: tuple[str, ...] = ()
    for where, item in rows:
        fields = fields or text_fields({name: _kind(value) for name, value in item.items()}, where)
        yield joined(item, fields, where)


def _placed_rows(path: Path) -> Iterator[Placed]:
    if path.suffix.lower() == ".csv":
        return _csv_rows(path)
    return _json_list(path) if path.suffix.lower() == ".json" else _json_rows(path)


def _csv_rows(path: Path) -> Iterator[Placed]:
    """Yield each row of a CSV file by the names in its first line."""
    csv.field_size_limit(_LONGEST_FIELD)
    with _reading(path), path.open(encoding=_encoding(path), newline="") as lines:
        try:
            for row in csv.DictReader(lines):
                row.pop(None, None)  # cells beyond the last name
                yield f"{path}", dict(row)
        except csv.Error as error:
            raise InputError(f"{path}: not a CSV file ({error}); write it again, quoted") from error


def _json_list(path: Path) -> Iterator[Placed]:
    """Yield the objects of a JSON file that is a list of them; a file of JSON lines is read as such."""
    with _reading(path):
        text = path.read_text(encoding=_encoding(path))
    if not text.lstrip().startswith("["):
        yield from _json_rows(path)
        return
    items = _loaded(text, str(path), "copy the file again")
    for number, item in enumerate(items, start=1):
        where = f"{path}, entry {number}"
        yield where, _object(item, where)


def _json_rows(path: Path) -> Iterator[Placed]:
    """Yield each object of a file of JSON lines, and its location."""
    with _reading(path), path.open(encoding=_encoding(path)) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE), ""), start=1):
            where = f"{path}, line {number}"
            if len(line) == _LONGEST_LINE:
                raise InputError(f"{where}: longer than {_LONGEST_LINE >> 20} MiB; each line must be one object")
            if line.strip():
                yield where, _json_object(line, where)


def _json_object(line: str, where: str) -> dict[str, Any]:
    return _object(_loaded(line, where, "each line must be one object"), where, "each line")


def _loaded(text: str, where: str, advice: str) -> Any:
    """Return the data of a JSON text; of an error in several lines, say in which."""
    try:
        return from_json(text)
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}" if "\n" in text.strip() else where
        raise InputError(f"{place}: not JSON ({error.msg}); {advice}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half a character (a lone surrogate); write it again") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise InputError(f"{where}: not JSON ({reason}); {advice}") from error


def _object(item: Any, where: str, each: str = "each entry") -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InputError(f"{where}: a {type(item).__name__}; {each} must be an object with a field 'text'")
    return item


def _kind(value: Any) -> str:
    known = ((str, "string"), (list, "list"), (type(None), "null"))
    return next((kind for python_type, kind in known if isinstance(value, python_type)), "other")


def _parquet(path: Path) -> Iterator[str]:
    with _parquet_file(path) as file:
        kinds = {field.name: _arrow_kind(field.type) for field in file.schema_arrow}
        fields = text_fields(kinds, str(path))
        for item in _parquet_rows(file, list(fields)):
            yield joined(item, fields, str(path))


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _reading(path):
        try:
            with pq.ParquetFile(path) as file:
                yield file
        except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a readable parquet file: {error}; write it again") from error


def _parquet_rows(file: Any, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(batch_size=256, columns=columns):
        yield from batch.to_pylist()


def local_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Return the rows of a file of JSON, JSON lines, CSV or parquet, all fields of them.

    Raises:
        InputError: another kind of file, or one that cannot be read.
    """
    if path.suffix.lower() in (*LINES, *TABLES):
        yield from (item for _, item in _placed_rows(path))
    elif path.suffix.lower() == ".parquet":
        with _parquet_file(path) as file:
            yield from _parquet_rows(file)
    else:
        raise InputError(f"cannot read rows from {path}: known are {', '.join(ROWS)}")


def _arrow_kind(arrow_type: Any) -> str:
    import pyarrow as pa

    if pa.types.is_dictionary(arrow_type):
        return _arrow_kind(arrow_type.value_type)
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        return "list"
    return "string" if str(arrow_type) in ("string", "large_string", "string_view") else "other"


def text_fields(kinds: Mapping[str, str], where: str) -> tuple[str, ...]:
    """Choose the fields that hold the text, given the kind ("string", "list", "null", ...) of each field.

    The first of: `text`; `messages` or `conversations` of a chat; `instruction`, `input`, `output`; the only string;
    `content`; a pair such as `prompt` and `response`, or `question` and `answer`.

    Raises:
        InputError: none of these; the message names the fields there are.
    """
    strings = [name for name, kind in kinds.items() if kind == "string"]
    possible = [name for name, kind in kinds.items() if kind in ("string", "null")]
    if "text" in possible:
        return ("text",)
    for chat in ("messages", "conversations"):
        if kinds.get(chat) == "list":
            return (chat,)
    if "instruction" in possible and "output" in possible:
        return tuple(name for name in ("instruction", "input", "output") if name in possible)
    if len(strings) == 1:
        return (strings[0],)
    if "content" in possible:
        return ("content",)
    for pair in _PAIRS:
        if set(pair) <= set(possible):
            return pair
    raise InputError(
        f"{where}: which field is the text? Found {', '.join(kinds) or 'none'}; rename the right one 'text'"
    )


def joined(item: Mapping[str, Any], fields: tuple[str, ...], where: str) -> str:
    """Join the given fields of one row with newlines; nulls and empty strings are left out."""
    missing = [name for name in fields if name not in item]
    if len(missing) == len(fields):
        raise InputError(f"{where}: no field '{missing[0]}'; found {', '.join(item) or 'none'}")
    parts = [part for name in fields for part in _strings(item.get(name), name, where)]
    return parts[0] if len(parts) == 1 else "\n".join(part for part in parts if part)


def _strings(value: Any, name: str, where: str) -> list[str]:
    """Return a field as strings: itself, or the contents of a list of chat messages."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if name in ("messages", "conversations") and isinstance(value, list):
        contents = [_said(turn) if isinstance(turn, dict) else turn for turn in value]
        return [text for content in contents for text in _strings(content, f"{name}.content", where)]
    raise InputError(f"{where}: field '{name}' is of type {type(value).__name__}, not text")


def _said(turn: Mapping[str, Any]) -> Any:
    """Return what a turn of a chat says: `content`, or ShareGPT's `value`."""
    return turn["content"] if "content" in turn else turn.get("value")

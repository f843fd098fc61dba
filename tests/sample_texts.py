"""Small texts for tests, and the tokens in them."""

import json
import random


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def prose(number, words=40):
    """Return a document that no other number gives."""
    rng = random.Random(number)
    return f"document {number}: " + " ".join(rng.choices(["for", "x", "in", "range", "def"], k=words))


def write_lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def written_folder(path, count=12):
    for number in range(count):
        (path / f"{number:02}.txt").write_text(prose(number), encoding="utf-8")
    return str(path)

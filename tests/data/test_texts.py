"""How texts become windows, and what is said when they cannot."""

import copy
import logging
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import secateur
from sample_texts import ids_of, prose, write_lines, written_folder
from secateur.data.mixtures import apportion
from secateur.data.texts import Reader, open_texts
from secateur.errors import InputError

BUNDLED = Path(next(iter(secateur.__path__))) / "bundled"


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
    limits = {name: value for name, value in settings.items() if name in ("vocab_size", "max_positions")}
    others = {name: value for name, value in settings.items() if name not in limits}
    with pytest.raises(InputError, match=message):
        open_texts("python-stdlib", Reader(tokenizer, **limits), **others)


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
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        open_texts("python-stdlib", tokenizer, windows=2)
        assert not records
        tokenizer("x " * 1000)
        assert "longer than" in records[0].getMessage()  # the handler does see it when it comes
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


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
    assert apportion([0.5, 0.3, 0.2], 7) == [4, 2, 1]
    assert apportion([1 / 3] * 3, 8) == [3, 3, 2]
    assert apportion([0.98, 0.01, 0.01], 5) == [3, 1, 1]


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
def test_each_window_of_a_mixture_knows_its_part(tokenizer):
    for split in ("calibration", "held-out"):
        windows = open_texts("a.txt:0.75,b.txt:0.25", tokenizer, windows=8, seq_len=16, split=split)
        assert windows.parts == ("a.txt", "b.txt")
        assert windows.part_of.tolist().count(1) == 2
        own = open_texts("b.txt", tokenizer, windows=2, seq_len=16, split=split)
        assert torch.equal(windows.tokens[windows.part_of == 1].sort(0).values, own.tokens.sort(0).values)
        some = windows.some([1, 5, 7])
        assert torch.equal(some.part_of, windows.part_of[[1, 5, 7]])
        kept, held = windows.split_off(0.25)
        assert len(kept.part_of) + len(held.part_of) == 8
        assert kept.parts == held.parts == windows.parts
    assert open_texts("a.txt", tokenizer, windows=2, seq_len=16).part_of is None


@pytest.mark.usefixtures("two_files")
def test_a_mixture_with_too_little_text_in_a_part_says_which(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text(prose(0))
    windows = open_texts("a.txt,short.txt", tokenizer, windows=8, seq_len=16)
    (note,) = [note for note in windows.notes if "instead of" in note]
    assert note.startswith("short.txt: ")
    (tmp_path / "short.txt").write_text("no")
    with pytest.raises(InputError, match=r"too little text in short.txt: 1 tokens? of text, one window needs 16"):
        open_texts("a.txt,short.txt", tokenizer, windows=8, seq_len=16)
    (tmp_path / "short.txt").write_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(InputError, match=r"short.txt is not UTF-8 text"):
        open_texts("a.txt,short.txt", tokenizer, windows=8, seq_len=16)


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


@pytest.mark.usefixtures("two_files")
def test_of_a_mixture_every_source_is_held_back(tokenizer):
    windows = open_texts("a.txt:0.75,b.txt:0.25", tokenizer, windows=8, seq_len=16)
    kept, held = windows.split_off(0.25)
    assert sorted(held.part_of.tolist()) == [0, 0, 1]
    assert sorted(map(tuple, torch.cat([kept.tokens, held.tokens]).tolist())) == sorted(
        map(tuple, windows.tokens.tolist())
    )

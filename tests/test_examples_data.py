"""The examples' corpus, tokenizers and batches."""

import logging
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from examples_support import make_corpus

from data import eval_batches, load_corpus, train_batches
from presets import SettingsError
from tokens import ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer()


def documents(tokens: np.ndarray) -> list[str]:
    """The texts of a token array; every one of them ends with end-of-text."""
    ends = np.flatnonzero(tokens == BYTES.end_of_text)
    assert ends[-1] == len(tokens) - 1
    return [BYTES.decode(part) for part in np.split(tokens, ends)[:-1]]


def test_documents_are_joined_in_path_order_and_held_out_whole(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "code", 40)
    corpus = load_corpus([folder], BYTES, 0.2)
    assert corpus.val_files
    assert set(corpus.train_files).isdisjoint(corpus.val_files)
    names = [f"code/{path.name}" for path in sorted(folder.iterdir(), key=lambda p: p.name)]
    assert sorted(corpus.train_files + corpus.val_files) == names
    for tokens, files in ((corpus.train, corpus.train_files), (corpus.val, corpus.val_files)):
        assert list(files) == sorted(files)
        assert documents(tokens) == [(tmp_path / name).read_text() for name in files]
    assert corpus.val_bytes == len(corpus.val) - len(corpus.val_files)


def test_split_depends_on_the_relative_path_alone(tmp_path: Path) -> None:
    before = load_corpus([make_corpus(tmp_path / "a" / "code", 40)], BYTES, 0.2)
    elsewhere = make_corpus(tmp_path / "b" / "code", 40)
    (elsewhere / "another.py").write_text("pass\n")
    (elsewhere / "module_3.py").write_text("changed = True\n")
    after = load_corpus([elsewhere], BYTES, 0.2)
    assert set(before.val_files) <= set(after.val_files)
    assert set(before.train_files) <= set(after.train_files)
    assert before.fingerprint != after.fingerprint
    again = load_corpus([tmp_path / "a" / "code"], BYTES, 0.2)
    assert again.fingerprint == before.fingerprint


def test_one_file_is_split_by_its_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("0123456789" * 10)
    corpus = load_corpus([path], BYTES, 0.1)
    assert documents(corpus.train) == ["0123456789" * 9]
    assert documents(corpus.val) == ["0123456789"]


def test_default_corpus_is_the_standard_library() -> None:
    corpus = load_corpus([], BYTES, 0.05)
    names = corpus.train_files + corpus.val_files
    assert "argparse.py" in names
    assert all(name.endswith(".py") for name in names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "site-packages", "encodings"})
    assert len(corpus.train) > 3_000_000
    assert 0.01 < len(corpus.val) / len(corpus.train) < 0.15


def test_undecodable_and_hidden_files_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_corpus(tmp_path / "code")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "zeros.bin").write_bytes(bytes(10))
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden\n")
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus([folder], BYTES, 0.3)
    assert corpus.num_skipped == 3
    assert "3 of 15 files skipped" in caplog.text
    assert len(corpus.train_files) + len(corpus.val_files) == 12


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"], ids=["none", "empty", "binary"])
def test_corpus_without_text_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(SettingsError, match=r"no text in .*Give --data files or folders of UTF-8"):
        load_corpus([tmp_path], BYTES, 0.1)


def test_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere does not exist\. Give files or folders"):
        load_corpus([tmp_path / "nowhere"], BYTES, 0.1)


def test_an_epoch_holds_every_window_once_and_the_next_another_order() -> None:
    context, rows = 8, 4
    tokens = np.arange(16 * context + 1, dtype=np.int32)
    batches = train_batches(tokens, context, rows, seed=0)
    epochs = [np.concatenate([next(batches) for _ in range(4)]) for _ in range(2)]
    windows = np.stack([tokens[i * context : (i + 1) * context + 1] for i in range(16)])
    for epoch in epochs:
        assert epoch.dtype == np.int32
        np.testing.assert_array_equal(epoch[np.argsort(epoch[:, 0])], windows)
    assert not np.array_equal(epochs[0], epochs[1])
    other = next(train_batches(tokens, context, rows, seed=1))
    assert not np.array_equal(other, epochs[0][:rows])


def test_iterator_resumes_from_its_state() -> None:
    tokens = np.arange(1000, dtype=np.int32)
    batches = train_batches(tokens, 8, 4, seed=3)
    for _ in range(45):  # beyond the first epoch
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(40)]
    resumed = train_batches(tokens, 8, 4, seed=3)
    resumed.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(resumed), batch)


def test_too_little_text_is_an_error() -> None:
    tokens = np.zeros(100, np.int32)
    with pytest.raises(SettingsError, match="100 training tokens are 12 windows of 8, fewer"):
        train_batches(tokens, 8, 16, seed=0)
    with pytest.raises(SettingsError, match="8 held-out tokens are less than one window of 8"):
        eval_batches(tokens[:8], 8, 4)


def test_eval_batches_are_padded_with_rows_of_no_weight() -> None:
    tokens = np.arange(10 * 8 + 1, dtype=np.int32)
    batches = eval_batches(tokens, 8, 4)
    assert [batch.weights.tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert all(batch.tokens.shape == (4, 9) for batch in batches)
    firsts = [row[0] for b in batches for row, w in zip(b.tokens, b.weights, strict=True) if w]
    assert firsts == list(range(0, 80, 8))
    some = eval_batches(tokens, 8, 4, max_windows=5)
    assert [row[0] for b in some for row in b.tokens][:5] == [0, 16, 32, 48, 64]


def test_bytes_round_trip() -> None:
    text = "naïve = 'π'\n"
    ids = BYTES.encode(text)
    assert ids.max() < BYTES.end_of_text < BYTES.vocab_size
    assert BYTES.decode([*ids, BYTES.end_of_text]) == text
    assert BYTES.decode(ids[:3]) == "na\ufffd"


def _train_json(path: Path, special: list[str]) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def return import self"] * 3, trainer)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("special", [[], ["<|endoftext|>"]], ids=["added", "own"])
def test_json_tokenizer(tmp_path: Path, special: list[str]) -> None:
    tokenizer = load_tokenizer(str(_train_json(tmp_path / "tokenizer.json", special)))
    ids = tokenizer.encode("def f(self): return 1\n")
    assert len(ids) < len("def f(self): return 1\n")
    assert ids.dtype == np.int32
    assert tokenizer.end_of_text not in ids
    assert max(ids.max(), tokenizer.end_of_text) < tokenizer.vocab_size
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == "def f(self): return 1\n"


def test_tiktoken_tokenizer(tmp_path: Path) -> None:
    import base64

    words = [bytes([i]) for i in range(256)] + [b"de", b"def"]
    lines = [base64.b64encode(word).decode() + f" {rank}" for rank, word in enumerate(words)]
    path = tmp_path / "small.tiktoken"
    path.write_text("\n".join(lines))
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (259, 258)
    ids = tokenizer.encode("def f")
    assert ids.tolist() == [257, 32, 102]
    assert tokenizer.decode([*ids, 258]) == "def f"


def test_bad_tokenizers_are_errors(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'words' is not 'bytes' and not an existing"):
        load_tokenizer("words")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(SettingsError, match=r"cannot be read as a \.json vocabulary"):
        load_tokenizer(str(broken))

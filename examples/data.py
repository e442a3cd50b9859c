"""Text files to batches of token windows: corpus, held-out files, and the grain pipeline."""

from __future__ import annotations

import hashlib
import logging
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from presets import SettingsError
from tokens import Tokenizer

log = logging.getLogger("data")

# Folders that hold no source text of the library itself: its tests, what pip put there, and tables
# made by programs, which would flatter the loss, being easy to predict.
_SKIP_IN_STDLIB = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"]
)

Document = tuple[str, str]
"""Relative path and text."""


@dataclass(frozen=True)
class Corpus:
    """Tokens of the training and the held-out documents, each followed by end-of-text."""

    train: np.ndarray
    """int32 [num_train_tokens]"""
    val: np.ndarray
    """int32 [num_val_tokens]"""
    val_bytes: int
    """Bytes of the held-out text, for a loss per byte, by which tokenizers can be compared."""
    train_files: tuple[str, ...]
    val_files: tuple[str, ...]
    num_skipped: int
    """Files left out because they are not UTF-8 text or could not be read."""

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens: a run may go on only with the data it began with."""
        digest = hashlib.blake2b(self.train.tobytes(), digest_size=16)
        digest.update(self.val.tobytes())
        return digest.hexdigest()


def load_corpus(paths: Sequence[Path], tokenizer: Tokenizer, val_fraction: float) -> Corpus:
    """Reads and tokenizes files and folders; the standard library's source if none are given.

    The order is that of the sorted relative paths: the same files give the same tokens on every
    machine. A file is held out when the hash of its relative path says so, so that a new file moves
    no other from one side to the other. Where that leaves a side empty (a single file, say), the
    end of every file is held out instead.

    Raises SettingsError when a path does not exist or nothing in it is readable text.
    """
    files = _list_files(paths)
    texts = [(name, _read(path)) for name, path in files]
    documents = [(name, text) for name, text in texts if text]
    num_skipped = sum(text is None for _, text in texts)
    if num_skipped:
        log.warning(
            "%d of %d files skipped: not UTF-8 text, or unreadable", num_skipped, len(files)
        )
    if not documents:
        where = ", ".join(map(str, paths)) or sysconfig.get_path("stdlib")
        raise SettingsError(
            f"data: no text in {where}: {len(files)} files, {num_skipped} of them not readable as "
            "UTF-8, the others empty. Give --data files or folders of UTF-8 text."
        )
    train, val = _split(documents, val_fraction)
    return Corpus(
        train=_join(train, tokenizer),
        val=_join(val, tokenizer),
        val_bytes=sum(len(text.encode("utf-8")) for _, text in val),
        train_files=tuple(name for name, _ in train),
        val_files=tuple(name for name, _ in val),
        num_skipped=num_skipped,
    )


def _list_files(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """(relative name, path) of every file, sorted by name within each root."""
    if not paths:
        library = _walk(Path(sysconfig.get_path("stdlib")), _SKIP_IN_STDLIB)
        return [(name, path) for name, path in library if name.endswith(".py")]
    found: list[tuple[str, Path]] = []
    for path in paths:
        if path.is_dir():
            found += [(f"{path.resolve().name}/{name}", file) for name, file in _walk(path)]
        elif path.exists():
            found.append((path.name, path))
        else:
            raise SettingsError(f"data: {path} does not exist. Give files or folders of text.")
    return found


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> list[tuple[str, Path]]:
    """Every file below root, sorted, but hidden ones and those in folders of the names to skip.

    Links to folders are not followed.
    """
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name[0] != "." and name not in skip]
        paths = (Path(folder, name) for name in names if name[0] != ".")
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(found)


def _read(path: Path) -> str | None:
    """The text of a file; None when it is not UTF-8 text or cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


def _split(documents: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents."""
    held_out = {name for name, _ in documents if _hash_fraction(name) < val_fraction}
    val = [(name, text) for name, text in documents if name in held_out]
    train = [(name, text) for name, text in documents if name not in held_out]
    if train and val:
        return train, val
    log.warning(
        "too few files (%d) to hold out whole ones: the last %g of every file is held out",
        len(documents),
        val_fraction,
    )
    cuts = [len(text) - max(1, round(len(text) * val_fraction)) for _, text in documents]
    train = [(name, text[:cut]) for (name, text), cut in zip(documents, cuts, strict=True)]
    val = [(name, text[cut:]) for (name, text), cut in zip(documents, cuts, strict=True)]
    return train, val


def _hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _join(documents: list[Document], tokenizer: Tokenizer) -> np.ndarray:
    end = np.array([tokenizer.end_of_text], dtype=np.int32)
    return np.concatenate([a for _, text in documents for a in (tokenizer.encode(text), end)])


class Windows(grain.sources.RandomAccessDataSource):
    """Packed windows of `context` + 1 tokens; neighbours share a token, so each is a target once.

    Windows cross the ends of documents; the model learns what end-of-text means from them.
    """

    def __init__(self, tokens: np.ndarray, context: int) -> None:
        self._tokens = tokens
        self._context = context

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._context

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._context
        return self._tokens[start : start + self._context + 1]


def train_batches(
    tokens: np.ndarray, context: int, batch_size: int, seed: int
) -> grain.DatasetIterator:
    """An endless iterator of int32 [batch_size, context + 1], newly shuffled in each epoch.

    Its `get_state` and `set_state` hold the position, so that a resumed run sees the same batches.
    Every process of a run makes the same global batch and uses the rows of its devices: the order
    does not depend on how many processes there are.

    Raises SettingsError when the text is shorter than one batch.
    """
    windows = Windows(tokens, context)
    if len(windows) < batch_size:
        raise SettingsError(
            f"data: {len(tokens)} training tokens are {len(windows)} windows of {context}, fewer "
            f"than one batch ({batch_size}). Give more text, or a smaller --train.batch-size or "
            "--model.context."
        )
    dataset = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    # The windows lie in memory: threads would only take cores from the training step.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.batch(batch_size, drop_remainder=True).to_iter_dataset(options))


@dataclass(frozen=True)
class EvalBatch:
    """Held-out windows, filled up to a full batch with rows of weight 0."""

    tokens: np.ndarray
    """int32 [batch_size, context + 1]"""
    weights: np.ndarray
    """float32 [batch_size]"""


def eval_batches(
    tokens: np.ndarray, context: int, batch_size: int, max_windows: int | None = None
) -> list[EvalBatch]:
    """Held-out windows in order; with max_windows, that many spread evenly over the text.

    Raises SettingsError when the held-out text is shorter than one window.
    """
    windows = Windows(tokens, context)
    if not len(windows):
        raise SettingsError(
            f"data: {len(tokens)} held-out tokens are less than one window of {context}. Give more "
            "text, a larger --val-fraction or a smaller --model.context."
        )
    count = len(windows) if max_windows is None else min(max_windows, len(windows))
    chosen = np.arange(count) * len(windows) // count
    batches = []
    for start in range(0, count, batch_size):
        rows = [windows[i] for i in chosen[start : start + batch_size]]
        padding = batch_size - len(rows)
        batches.append(
            EvalBatch(
                tokens=np.stack(rows + [np.zeros_like(rows[0])] * padding),
                weights=np.array([1.0] * len(rows) + [0.0] * padding, dtype=np.float32),
            )
        )
    return batches

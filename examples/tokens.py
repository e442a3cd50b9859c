"""Tokenizers: bytes by default; a tokenizers .json or a .tiktoken file as an option."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from presets import SettingsError

# The names under which published vocabularies keep their end-of-text token.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    """Ids are below this, end_of_text included."""
    end_of_text: int
    """The id between documents, and the one at which decoding stops."""

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of the text, without end-of-text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; end-of-text gives nothing, a broken UTF-8 sequence U+FFFD."""


class ByteTokenizer:
    """One token per byte of UTF-8, and end-of-text after the 256 bytes."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A `tokenizer.json` of the tokenizers library."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        found = (self._tokenizer.token_to_id(name) for name in _END_OF_TEXT)
        end = next((i for i in found if i is not None), None)
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        # A vocabulary without the token gets one more id.
        self.end_of_text = size if end is None else end
        self.vocab_size = max(size, self.end_of_text + 1)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if int(i) != self.end_of_text])


class TiktokenTokenizer:
    """Merge ranks of a .tiktoken file, with GPT-2's split pattern and one id for end-of-text."""

    def __init__(self, path: Path) -> None:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        # Read here: tiktoken's own loader keeps a copy and does not see the file change.
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        self.end_of_text = max(ranks.values()) + 1
        self.vocab_size = self.end_of_text + 1
        self._encoding = tiktoken.Encoding(
            path.stem, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([int(i) for i in ids if int(i) < self.end_of_text])


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a setting: `bytes`, a .json file or a .tiktoken file.

    Raises SettingsError when there is no such file, or it cannot be read as what its name says.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    kinds: dict[str, Callable[[Path], Tokenizer]] = {
        ".json": JsonTokenizer,
        ".tiktoken": TiktokenTokenizer,
    }
    if path.suffix not in kinds or not path.is_file():
        raise SettingsError(
            f"tokenizer: {name!r} is not 'bytes' and not an existing .json (tokenizers) or "
            ".tiktoken file. Give the path of such a file, or leave the option out for bytes."
        )
    try:
        return kinds[path.suffix](path)
    except ImportError as error:
        raise SettingsError(
            f"tokenizer: {name} needs a library that is not installed ({error}). "
            "Install it with: pip install 'jaxmoe[examples]'."
        ) from error
    except Exception as error:  # the tokenizers library raises bare Exception
        raise SettingsError(
            f"tokenizer: {name} cannot be read as a {path.suffix} vocabulary ({error})."
        ) from error

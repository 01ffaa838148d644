"""A tokenizer as the embedded engine needs it: text to tokens, and which bytes each token stands for."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from apprentice.local.grammar import Position

__all__ = ["Vocabulary"]

_TRIES = 64
"""Tokens tried in order of likelihood before the whole vocabulary is."""


class Vocabulary:
    """A tokenizer as decoding needs it: text to token ids, and each token's bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = set(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.bytes: list[bytes] = [b""] * len(tokenizer)
        byte_level = _byte_level() if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder) else None
        for token, index in tokenizer.get_vocab().items():
            if index not in special:
                self.bytes[index] = _token_bytes(token, byte_level)
        # What is forced and what an enum allows recurs in every answer.
        self.encode = lru_cache(maxsize=4096)(self.tokens)

    def tokens(self, text: str) -> tuple[int, ...]:
        """The tokens of a text in which special tokens are letters."""
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    def likeliest(self, scores: torch.Tensor, position: Position) -> tuple[int, Position] | None:
        """The likeliest token the grammar takes, and where it leads. ``scores``: 1-D, of the whole vocabulary."""
        for count in (1, _TRIES, len(scores)):
            for token in torch.topk(scores, min(count, len(scores))).indices.tolist():
                if token < len(self.bytes) and self.bytes[token]:
                    after = position.advance(self.bytes[token])
                    if after is not None:
                        return token, after
        return None


def _byte_level() -> dict[str, int]:
    """GPT-2's spelling of bytes as visible characters: printable Latin-1 as itself, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {chr(byte): byte for byte in visible}
    others = (byte for byte in range(256) if byte not in set(visible))
    return spelled | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _token_bytes(token: str, byte_level: dict[str, int] | None) -> bytes:
    if byte_level is not None:
        # An added token is spelled as it is, and may hold characters that the spelling does not know.
        known = [byte_level.get(character) for character in token]
        return token.encode() if None in known else bytes(b for b in known if b is not None)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes((int(token[3:5], 16),))
    return token.replace("\u2581", " ").encode()

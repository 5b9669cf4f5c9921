"""CLIP's byte-pair vocabulary as a list of tokens and merges, which Hugging Face's tokenizers are made of.

instant-clip-tokenizer holds it and gives none of it out but by decoding. A token's bytes follow from what it
decodes to among bytes that make it whole characters; its merge is the pair of earlier tokens that byte-pair
encoding (Sennrich et al. 2016, algorithm 1) leaves of those bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise, product

Decode = Callable[[Sequence[int]], str]

BYTES = 256
FIRST_MERGE = 2 * BYTES
END_OF_WORD = "</w>"
REPLACEMENT = "\ufffd"
LEADS = ((), (0xC3,), (0xE1,), (0xE1, 0x80), (0xF1,), (0xF1, 0x80), (0xF1, 0x80, 0x80))
TAILS = ((), *(tail for first in (0x80, 0x90, 0xA0) for tail in ((first,), (first, 0x80), (first, 0x80, 0x80))))
"""Bytes before and after which any part of a character becomes a whole one."""


@cache
def byte_signs() -> list[tuple[int, str]]:
    """Return (byte, its printable sign) in the order of the first 256 ids, that of GPT-2 (Radford et al. 2019)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in own]
    return [(byte, chr(byte)) for byte in own] + [(byte, chr(BYTES + place)) for place, byte in enumerate(others)]


def clip_vocabulary(decode: Decode, size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Return CLIP's tokens by id, and its merges in order; ids from `size` on are special tokens.

    Args:
        decode: token ids to text, as instant-clip-tokenizer does it.
        size: ids of bytes and merges.

    Raises:
        ValueError: this is not how such a vocabulary decodes.
    """
    signs = [sign for _, sign in byte_signs()]
    tokens = signs + [sign + END_OF_WORD for sign in signs]
    ranks: dict[tuple[str, str], int] = {}
    for token in range(FIRST_MERGE, size):
        pair = _left_of(_symbols(decode, token), ranks)
        if len(pair) != 2:
            raise ValueError(f"token {token} is no merge of two tokens before it, but of {len(pair)}")
        ranks[pair[0], pair[1]] = token
        tokens.append("".join(pair))
    return tokens, list(ranks)


def _symbols(decode: Decode, token: int) -> list[str]:
    """Return the byte signs of a token, the last with the mark of a word's end if the token ends one."""
    sign_of = dict(byte_signs())
    whole = _bytes_of(decode, token)
    symbols = [sign_of[byte] for byte in whole.removesuffix(b" ")]
    return [*symbols[:-1], symbols[-1] + END_OF_WORD] if whole.endswith(b" ") else symbols


def _bytes_of(decode: Decode, token: int) -> bytes:
    """Return what a token stands for; a space follows the end of a word."""
    id_of = {byte: number for number, (byte, _) in enumerate(byte_signs())}
    for tail, lead in product(TAILS, LEADS):
        text = decode([*(id_of[byte] for byte in lead), token, *(id_of[byte] for byte in tail)])
        if REPLACEMENT not in text:
            whole = text.encode()
            return whole[len(lead) : len(whole) - len(tail)]
    return decode([token]).encode()  # no surrounding is of help to the replacement character itself


def _left_of(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge by rank, lowest first, until no pair of neighbours has one."""
    while True:
        known = [(ranks[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not known:
            return symbols
        _, place = min(known)
        symbols = [*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :]]

"""A tokenizer as the files that Hugging Face's AutoTokenizer reads."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, normalizers, processors
from tokenizers import Tokenizer as Tokenization

from train.clip_vocabulary import clip_vocabulary
from train.tokenizer import END, PADDING, START, ClipTokenizer, CorpusTokenizer, Tokenizer


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, str]:
    """Return file names and contents; ids are those of `encode` for text that needs no mending.

    Neither broken encodings nor HTML escapes are undone by them.

    Args:
        tokenizer: of either kind.
        context: longest text, tokens.

    Raises:
        TypeError: neither kind.
    """
    if isinstance(tokenizer, CorpusTokenizer):
        return _corpus_files(tokenizer, context)
    if isinstance(tokenizer, ClipTokenizer):
        return _clip_files(tokenizer, context)
    raise TypeError(f"{type(tokenizer).__name__} has no form as files")


def _corpus_files(tokenizer: CorpusTokenizer, context: int) -> dict[str, str]:
    whole = Tokenization.from_str(tokenizer.to_json())
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    whole.normalizer = normalizers.Sequence([*spaces, whole.normalizer])
    ends = [(token, whole.token_to_id(token)) for token in (START, END)]
    whole.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    settings = _settings("PreTrainedTokenizerFast", context, PADDING)
    return {"tokenizer.json": whole.to_str(pretty=True), "tokenizer_config.json": settings}


def _clip_files(tokenizer: ClipTokenizer, context: int) -> dict[str, str]:
    tokens, merges = clip_vocabulary(tokenizer.decode_raw, tokenizer.vocabulary - 2)
    ids = {token: number for number, token in enumerate([*tokens, START, END])}
    return {
        "vocab.json": json.dumps(ids, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]),
        "tokenizer_config.json": _settings("CLIPTokenizer", context, END),
    }


def _settings(kind: str, context: int, padding: str) -> str:
    settings: dict[str, Any] = {
        "tokenizer_class": kind,
        "model_max_length": context,
        "bos_token": START,
        "eos_token": END,
        "pad_token": padding,
        "unk_token": END,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # spelt out in a text, they are text
    }
    return json.dumps(settings, indent=2)

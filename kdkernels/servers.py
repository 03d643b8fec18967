"""Teachers out of the answers of servers: vLLM, SGLang, and whatever speaks as OpenAI's API does.

Each lists the most likely tokens of a position. They come here as rows of pairs (id, log-probability), one row per
position and one list of rows per text; then as tensors, padded by -1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor

from kdkernels import checks

# Servers write this where a token has no log-probability worth the name, and below.
LEAST_LOGPROB = -9000.0
# Of float32 log-probabilities: the mass outside the entries is not known better.
ROUNDING = torch.finfo(torch.float32).eps

Row = list[tuple[int, float]]
TokenIds = Union[Mapping[Any, int], Callable[[str], Optional[int]]]


def vllm_texts(given: Any, k: Optional[int]) -> tuple[list[list[Row]], bool]:
    """The rows of ``prompt_logprobs`` or ``logprobs``, of a text or of several, and if they were several."""
    name = "prompt_logprobs"
    several = not _all(name, given, lambda position: position is None or isinstance(position, Mapping))
    for text in given if several else []:
        if not _all(name, text, lambda position: position is None or isinstance(position, Mapping)):
            raise TypeError(f"{name} must have None or a dict {{id: logprob}} per position")
    texts = [_after_none(text) for text in (given if several else [given])]
    return [[_vllm_row(position, k) for position in text] for text in texts], several


def _vllm_row(position: Optional[Mapping[Any, Any]], k: Optional[int]) -> Row:
    row = []
    for token, entry in (position or {}).items():
        rank = _get(entry, "rank")
        # The token that stands in the text is an entry whatever its rank.
        if k is None or rank is None or rank <= k:
            logprob = entry if isinstance(entry, (int, float)) else _get(entry, "logprob")
            row.append((_id("prompt_logprobs", token), _number("prompt_logprobs", logprob)))
    return row


def sglang_texts(given: Any) -> tuple[list[list[Row]], bool]:
    """The rows of ``input_top_logprobs`` or ``output_top_logprobs``, of a text or of several."""
    name = "input_top_logprobs"
    several = not _all(name, given, _is_sglang_position)
    for text in given if several else []:
        if not _all(name, text, _is_sglang_position):
            raise TypeError(f"{name} must have None or a list of (logprob, token id, text) per position")
    texts = [_after_none(text) for text in (given if several else [given])]
    rows = [[[(_id(name, e[1]), _number(name, e[0])) for e in position or ()] for position in text] for text in texts]
    return rows, several


def _is_sglang_position(value: Any) -> bool:
    if value is None:
        return True
    return _is_list(value) and all(_is_list(entry) and len(entry) >= 2 and _is_number(entry[0]) for entry in value)


def openai_texts(given: Any, token_ids: Any, missing: str) -> tuple[list[list[Row]], bool]:
    """The rows of ``choice.logprobs``, of a chat or of a completion, of one choice or of several."""
    checks.choice("missing", missing, ("error", "tail"))
    table = token_table(token_ids)
    several = _is_list(given)
    texts = []
    for choice in given if several else [given]:
        fields = [_get(choice, "content"), _get(choice, "top_logprobs")]
        # Of an answer without a token the list is empty.
        positions: Any = max(filter(_is_list, fields), key=len, default=None)
        if positions is None:
            raise TypeError(
                "logprobs must be choice.logprobs, with the field content (of a chat) or top_logprobs (of a "
                f"completion), got {type(choice).__name__}{_field(choice, 'logprobs', 'choices')}: ask the server for "
                "logprobs and top_logprobs"
            )
        texts.append([_openai_row(position, table, missing) for position in _after_none(positions)])
    return texts, several


def _openai_row(position: Any, table: TokenIds, missing: str) -> Row:
    if position is None:
        return []
    top = _get(position, "top_logprobs")
    if _is_list(top):
        entries = [(_get(entry, "token"), _get(entry, "bytes"), _get(entry, "logprob")) for entry in top]
    elif isinstance(position, Mapping) and "token" not in position:
        entries = [(token, None, logprob) for token, logprob in position.items()]
    else:
        raise ValueError("logprobs must have top_logprobs at every position: ask the server for top_logprobs=20")
    row = []
    for token, written, logprob in entries:
        found, number = _token_id(token, written, table), _number("logprobs", logprob)
        if found is not None:
            row.append((found, number))
        elif missing == "error" and number > LEAST_LOGPROB:
            raise ValueError(
                f"token_ids has no id for the token {token!r}: pass the tokenizer of the teacher, or missing='tail' to "
                "leave its probability to the tail"
            )
    return row


def _token_id(token: Any, written: Optional[Sequence[int]], table: TokenIds) -> Optional[int]:
    if not isinstance(token, str):
        raise TypeError(f"logprobs must have tokens that are strings, got {type(token).__name__}")
    # How vLLM and others say an id where a text is expected.
    if said := re.fullmatch(r"token_id:(\d+)", token):
        return int(said[1])
    if not isinstance(table, Mapping):
        return table(token)
    names = (*([bytes(written)] if written is not None else []), token, token.encode("utf-8", "surrogateescape"))
    return next((table[name] for name in names if name in table), None)


def token_table(tokenizer: Any) -> TokenIds:
    """The ids of a tokenizer's tokens by the bytes of their texts; a mapping or a function is taken as it is."""
    if not hasattr(tokenizer, "get_vocab"):
        if not isinstance(tokenizer, Mapping) and not callable(tokenizer):
            raise TypeError(
                "token_ids must be a tokenizer, a mapping from tokens (str or bytes) to ids, or a function, got "
                f"{type(tokenizer).__name__}"
            )
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    alphabet = byte_alphabet()
    # SentencePiece writes spaces so, and has bytes as tokens of their own; others write every byte as a character.
    pieces = any(token.startswith("\u2581") for token in vocabulary)
    table: dict[Any, int] = {}
    single: dict[Any, int] = {}
    for token, index in vocabulary.items():
        if token in special:
            table[token.encode()] = index
        elif pieces and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
            single[bytes([int(byte[1], 16)])] = index
        elif pieces or not all(char in alphabet for char in token):
            table[token.replace("\u2581", " ").encode()] = index
        else:
            table[bytes(alphabet[char] for char in token)] = index
    # Of two tokens of one text that of the text is meant.
    return {**single, **table}


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes: those that print stand for themselves."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


def tensors(texts: list[list[Row]], *, several: bool, k: Optional[int], device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and tails, of the longest text's length; without the first dimension for one text."""
    if k is not None:
        checks.integer("k", k, low=1)
    best = [[_best(row, k) for row in text] for text in texts]
    shape = len(best), max(map(len, best), default=0), max((len(row) for text in best for row in text), default=0) or 1
    ids = torch.full(shape, -1, dtype=torch.int32)
    logprobs = torch.full(shape, -torch.inf, dtype=torch.float64)
    for i, text in enumerate(best):
        for j, row in enumerate(text):
            for place, (token, logprob) in enumerate(row):
                ids[i, j, place], logprobs[i, j, place] = token, logprob
    found = [ids.to(device), logprobs.float().to(device), tail(logprobs).float().to(device)]
    a, b, c = found if several else [value[0] for value in found]
    return a, b, c


def tail(logprobs: Tensor) -> Tensor:
    """The log of the mass outside the entries: no less than rounding leaves open, and 0 where there is no entry."""
    used = logprobs > LEAST_LOGPROB
    values = torch.where(used, logprobs, 0.0).double()
    p = torch.where(used, values.exp(), 0.0)
    known = ROUNDING * (1 + 0.5 * (p * values.abs()).sum(-1))
    return torch.where(used.any(-1), torch.maximum(1 - p.sum(-1), known), 1.0).log()


def _best(row: Row, k: Optional[int]) -> Row:
    """The entries that say something, the most likely first, each id once."""
    found = {token: logprob for token, logprob in row if logprob > LEAST_LOGPROB}
    return sorted(found.items(), key=lambda entry: -entry[1])[:k]


def _after_none(positions: Sequence[Any]) -> list[Any]:
    """All positions but the first of a text, of which no model says anything."""
    found = list(positions)
    return found[1:] if found and found[0] is None else found


def _all(name: str, given: Any, is_position: Callable[[Any], bool]) -> bool:
    if not _is_list(given):
        hint = _field(given, name, "logprobs", "output_top_logprobs", "meta_info", "outputs")
        raise TypeError(f"{name} must be a list of positions, got {type(given).__name__}{hint}")
    return all(map(is_position, given))


def _field(given: Any, *names: str) -> str:
    """The end of an error: which field of an answer leads on."""
    found = next((name for name in names if _get(given, name) is not None), None)
    return f" with the field {found}" if found else ""


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _get(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, Mapping) else getattr(entry, name, None)


def _id(name: str, token: Any) -> int:
    if isinstance(token, bool) or not isinstance(token, (int, str)) or not str(token).isdecimal():
        raise TypeError(f"{name} must have ids that are integers, got {token!r}")
    return int(token)


def _number(name: str, value: Any) -> float:
    if not _is_number(value) or math.isnan(value):
        raise TypeError(f"{name} must have log-probabilities that are numbers, got {value!r}")
    if value > 1e-3:
        raise ValueError(f"{name} must have log-probabilities, got {value:g} above 0: pass log(p) of probabilities")
    return float(value)

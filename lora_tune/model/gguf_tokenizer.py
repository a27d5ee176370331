"""A base's tokenizer as the metadata of a GGUF file: tokens, merges or scores, how text is cut, the chat template.

llama.cpp knows ways of cutting text by name and has no other; a tokenizer that cuts in another way is refused. What
stays to be measured is measured where llama.cpp is installed: the ids of held-out conversations, one by one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_tune.errors import CheckFailed, Problem
from lora_tune.model.gguf_file import Value, u32

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type of llama.cpp
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_QWEN2 = rf"{_SHORT}|{_LETTERS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_SPACE = "▁"
_REFUSED_FIX = "export it for an engine that reads tokenizer.json, such as vLLM"
Cut = Literal["gpt-2", "qwen2", "llama-bpe", "dbrx", "smollm"]
Odd = Literal["not NFC", "space after control token"]


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """A tokenizer as llama.cpp reads it.

    `metadata` are its keys; `adds_bos`: llama.cpp puts bos before a text of its own accord; `stop_ids` are where
    llama.cpp stops by these keys alone; `cut_otherwise`: texts that llama.cpp cuts in another way, in words.
    """

    metadata: Mapping[str, Value]
    adds_bos: bool
    stop_ids: tuple[int, ...]
    cut_otherwise: Mapping[Odd, str]


def gguf_tokenizer(chat: ChatTemplate, *, rows: int) -> GgufTokenizer:
    """The tokenizer of a chat template, for a base with `rows` embeddings.

    Raises: CheckFailed where llama.cpp would cut text otherwise, naming the part.
    """
    tokenizer = chat.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("a tokenizer without tokenizer.json")
    content: dict[str, Any] = json.loads(backend.to_str())
    if content["model"].get("type") != "BPE":
        raise _refused(f"a tokenizer of type {content['model'].get('type')}")
    added = {int(entry["id"]): entry for entry in content["added_tokens"]}
    _check_added(added, chat.text)
    is_sentencepiece = bool(content["model"].get("byte_fallback"))
    specific, odd = _sentencepiece(content, chat) if is_sentencepiece else _byte_level(content)
    tokens, types = _tokens(content, added, rows=rows, spaces=_SPACE if is_sentencepiece else "")
    adds_bos = _adds_bos(chat)
    keys: dict[str, Value] = {
        **specific,
        "tokens": tokens,
        "token_type": types,
        "eos_token_id": u32(chat.eos_id),
        "padding_token_id": u32(chat.pad_id),
        "add_bos_token": adds_bos,
        "add_eos_token": False,
    }
    if is_sentencepiece:
        keys["scores"] = _scores(tokens, content["model"]["merges"], added)
    if tokenizer.bos_token_id is not None:
        keys["bos_token_id"] = u32(tokenizer.bos_token_id)
    stops = chat.stop_ids[:2]
    if len(stops) > 1:
        keys["eot_token_id"] = u32(stops[1])
    metadata: dict[str, Value] = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return GgufTokenizer({**metadata, "tokenizer.chat_template": chat.text}, adds_bos, stops, odd)


def _adds_bos(chat: ChatTemplate) -> bool:
    """Whether bos goes before every text: only where both the tokenizer and the chat template put it there.

    A server that renders the template strips the bos that the text begins with, and has it added.
    """
    from lora_tune.data.chat_template import starts_with_bos
    from lora_tune.data.conversation import Message

    prompt = chat.prompt_ids([Message("user", "a")])
    return starts_with_bos(chat.tokenizer) and prompt[:1] == [chat.tokenizer.bos_token_id]


def _byte_level(content: Mapping[str, Any]) -> tuple[dict[str, Value], dict[Odd, str]]:
    """Keys of a byte-level BPE tokenizer, and what about it llama.cpp leaves out."""
    odd: dict[Odd, str] = {}
    normalizer = content.get("normalizer")
    kinds = [step["type"] for step in _steps(normalizer, "normalizers")]
    if kinds == ["NFC"]:
        odd["not NFC"] = "text that is not in Unicode's form NFC is cut otherwise: llama.cpp does not normalise it"
    elif kinds:
        raise _refused(f"the normalizer {' + '.join(kinds)}")
    name = _cut(content)
    merges = content["model"]["merges"]
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    if any(pair.count(" ") != 1 for pair in pairs):
        raise _refused("merges with spaces in them")
    return {"model": "gpt2", "pre": name, "merges": pairs or ["Ġ Ġ"]}, odd


def _cut(content: Mapping[str, Any]) -> Cut:
    """llama.cpp's name for how a byte-level tokenizer cuts text into words."""
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    whole = bool(content["model"].get("ignore_merges"))
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _refused(f"the pre-tokenizer {_named(steps)}")
    by_words = last.get("use_regex", True)
    before = steps[:-1]
    if by_words and not before and not whole:
        return "gpt-2"
    if by_words and [step["type"] for step in before] == ["Digits"] and before[0].get("individual_digits"):
        if not whole:
            return "smollm"
    elif not by_words and len(before) == 1 and before[0]["type"] == "Split":
        split = before[0]
        pattern = split["pattern"].get("Regex")
        if split["behavior"] == "Isolated" and not split.get("invert"):
            if pattern == _QWEN2 and not whole:
                return "qwen2"
            if pattern == _LLAMA3:
                return "llama-bpe" if whole else "dbrx"
    raise _refused(f"the pre-tokenizer {_named(steps)}" + (" with ignore_merges" if whole else ""))


def _sentencepiece(content: Mapping[str, Any], chat: ChatTemplate) -> tuple[dict[str, Value], dict[Odd, str]]:
    """Keys of a tokenizer that was SentencePiece's: spaces as ▁, bytes for what has no piece.

    llama.cpp puts a space before a text and after every control token, or nowhere.
    """
    normalizers = _steps(content.get("normalizer"), "normalizers")
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    to_space = [step for step in normalizers if step["type"] == "Replace"]
    prepends = [step for step in normalizers if step["type"] == "Prepend"]
    known = len(normalizers) == len(to_space) + len(prepends) and len(to_space) <= 1 and len(prepends) <= 1
    known &= all(step["pattern"] == {"String": " "} and step["content"] == _SPACE for step in to_space)
    known &= all(step["prepend"] == _SPACE for step in prepends)
    odd: dict[Odd, str] = {}
    prefix = bool(prepends)
    if [step["type"] for step in steps] == ["Metaspace"] and not normalizers and not steps[0].get("split", True):
        scheme = steps[0].get("prepend_scheme", "always")
        prefix, known = scheme == "always", steps[0]["replacement"] == _SPACE
        if scheme == "always":
            odd["space after control token"] = "a space right after a control token is doubled by llama.cpp"
        if scheme == "first" and not _starts_with_control_token(chat):
            raise _refused("a tokenizer that puts a space before the first word alone, where a chat begins with words")
    else:
        splits = all(step["type"] == "Split" and step["pattern"] == {"String": " "} for step in steps)
        known &= len(to_space) == 1 and splits  # no space is left when the text is split at spaces
    if not known:
        raise _refused(f"the normalizer {_named(normalizers)} with the pre-tokenizer {_named(steps)}")
    return {"model": "llama", "pre": "default", "add_space_prefix": prefix}, odd


def _starts_with_control_token(chat: ChatTemplate) -> bool:
    from lora_tune.data.conversation import Message

    first = chat.prompt_ids([Message("user", "a")])[0]
    return first in chat.tokenizer.added_tokens_decoder


def _tokens(
    content: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], *, rows: int, spaces: str
) -> tuple[list[str], list[int]]:
    """Every token's text and type by id, up to the last row of the embeddings."""
    vocabulary = {int(number): text for text, number in content["model"]["vocab"].items()}
    unknown = content["model"].get("unk_token")
    tokens, types = [], []
    for number in range(rows):
        entry, text = added.get(number), vocabulary.get(number)
        if entry is not None:
            text = str(entry["content"])
            kind = _CONTROL if entry["special"] else _USER_DEFINED
            kind = _UNKNOWN if text == unknown else kind
            text = text.replace(spaces, " ") if spaces and kind == _USER_DEFINED else text
        elif text is None:
            text, kind = f"[PAD{number}]", _UNUSED
        elif text == unknown:
            kind = _UNKNOWN
        else:
            kind = _BYTE if spaces and len(text) == 6 and text.startswith("<0x") and text.endswith(">") else _NORMAL
        tokens.append(text)
        types.append(kind)
    if len(set(tokens)) != len(tokens):
        raise _refused("two tokens with the same text")
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[Any], added: Mapping[int, Any]) -> list[float]:
    """SentencePiece's scores: the earlier a piece is merged, the higher; 0 for what no merge makes.

    llama.cpp joins the two neighbours whose piece scores highest; tokenizer.json joins those of the earliest merge.
    """
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, number)
    last = float(len(merges) + 1)
    scores = []
    for number, text in enumerate(tokens):
        alone = number in added or len(text) == 1 or text.startswith("<0x")
        scores.append(0.0 if alone else -float(rank.get(text, last)))
    return scores


def _check_added(added: Mapping[int, Mapping[str, Any]], template: str) -> None:
    """Tokens that take white space with them have no form in a GGUF file; where the template uses them it matters."""
    odd = [
        entry["content"]
        for entry in added.values()
        if (entry["lstrip"] or entry["rstrip"] or entry["single_word"]) and entry["content"] in template
    ]
    if odd:
        raise _refused(f"the token {odd[0]!r}, which takes the white space beside it with it")


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    if not part:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _named(steps: Sequence[Mapping[str, Any]]) -> str:
    names = [f"Split({step['pattern']})" if step["type"] == "Split" else str(step["type"]) for step in steps]
    return " + ".join(names) or "none"


def _refused(what: str) -> CheckFailed:
    return CheckFailed(Problem(f"not supported in a GGUF file: {what}", _REFUSED_FIX))

"""Tokenizer and chat template of an adapter folder against those of its base. No torch, no tokenizer is built.

Servers take the base's tokenizer and template, whatever lies in the adapter folder: where the two differ, an adapter is
fed other tokens than it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_tune.adapter.folder import TEMPLATE
from lora_tune.adapter.regular_file import read_capped, read_json_object
from lora_tune.errors import CheckFailed, Problem

TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_MOST_BYTES = 64 << 20
_TEMPLATE_BYTES = 1 << 20


def template_text(folder: Path) -> str | None:
    """The chat template that lies in a folder: `chat_template.jinja`, else the one in `tokenizer_config.json`.

    Raises: CheckFailed for links, oversized files and broken JSON.
    """
    if (folder / TEMPLATE).exists():
        return read_capped(folder / TEMPLATE, max_bytes=_TEMPLATE_BYTES).decode("utf-8", errors="replace")
    if not (folder / _SETTINGS).exists():
        return None
    found = read_json_object(folder / _SETTINGS, max_bytes=_MOST_BYTES).get("chat_template")
    if isinstance(found, list):  # several templates by name, as some bases have them
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def differs(folder: Path, base: Path) -> bool | None:
    """Whether a folder's chat template is another one than its base's; None where the folder has none.

    Raises: CheckFailed as `template_text`.
    """
    own = template_text(folder)
    return None if own is None else own.strip() != (template_text(base) or "").strip()


def check_tokenizer(folder: Path, base: Path) -> Iterator[Problem]:
    """A warning where tokens of both tokenizers have other ids, or the adapter's has lost some of its base's.

    Raises: CheckFailed where the adapter's file is no sound JSON.
    """
    if not (folder / TOKENIZER).exists() or not (base / TOKENIZER).exists():
        return
    own, theirs = _ids(folder), _ids(base)
    moved = [token for token, number in own.items() if theirs.get(token, number) != number]
    lost = len(theirs.keys() - own.keys())
    for count, words in (
        (len(moved), "have another id than in the base's tokenizer"),
        (lost, "of its base's are missing"),
    ):
        if count:
            shown = f" (such as {json.dumps(moved[0])[:40]})" if words.startswith("have") else ""
            fix = "use the base's tokenizer, or the adapter that was trained with this one"
            yield Problem(f"{count} tokens{shown} {words}", fix, str(folder / TOKENIZER), severity="warning")


def _ids(folder: Path) -> dict[str, int]:
    """{token: id} of a `tokenizer.json`, added tokens included."""
    content = read_json_object(folder / TOKENIZER, max_bytes=_MOST_BYTES)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    ids: dict[str, int] = {}
    if isinstance(vocabulary, Mapping):
        ids |= {str(token): number for token, number in vocabulary.items() if isinstance(number, int)}
    elif isinstance(vocabulary, list):  # Unigram: [[token, score], ...] in the order of the ids
        ids |= {str(pair[0]): number for number, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    for item in added if isinstance(added, list) else []:
        ids |= _added(item)
    if not ids:
        raise CheckFailed(Problem("holds no vocabulary", "copy the file again", str(folder / TOKENIZER)))
    return ids


def _added(item: Any) -> dict[str, int]:
    if isinstance(item, Mapping) and isinstance(item.get("content"), str) and isinstance(item.get("id"), int):
        return {item["content"]: item["id"]}
    return {}

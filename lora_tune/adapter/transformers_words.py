"""The words of engines that render with a transformers tokenizer (vLLM, SGLang, mlx-lm, transformers itself).

They read a folder's tokenizer and template as they lie there, with jinja2 as transformers sets it up; nothing of the
renderer that training uses takes part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_tune.adapter.parity import Render
from lora_tune.data.conversation import Conversation
from lora_tune.errors import CheckFailed, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIGS = ("generation_config.json", "config.json")


def transformers_words(
    folder: Path,
    *,
    model: Path | None = None,
    template: str | None = None,
    contents: Literal["as the template reads them", "text"] = "as the template reads them",
) -> tuple[Render, frozenset[int]]:
    """How a transformers tokenizer of this folder renders a request, and the ids at which generation ends.

    They are the tokenizer's eos, and those that the generation settings and the configuration of `model` name.
    `template` is one that the engine is given besides the tokenizer. Some templates (of vision models) read contents
    as lists of parts: vLLM and SGLang notice and make such lists, mlx-lm always hands over text.

    Raises: UsageError where the folder has no sound tokenizer.
    """
    from lora_tune.model.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(folder, name=folder.name)
    if template is not None:
        tokenizer.chat_template = template
    in_parts = contents != "text" and _reads_parts(tokenizer)
    stops = _stop_ids(model) | ({int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set())

    def render(request: Conversation) -> list[int]:
        messages = [message.as_template_input() for message in request.messages]
        if in_parts:
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        try:
            ids = tokenizer.apply_chat_template(
                messages, tools=list(request.tools) or None, add_generation_prompt=True, return_dict=False
            )
        except (ValueError, TypeError, ArithmeticError, LookupError, _template_error()) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckFailed(Problem(reason, "use a base with a chat template")) from None
        return [int(token) for token in ids]

    return render, frozenset(stops)


def _reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    from lora_tune.data.template_check import probe_template

    if not tokenizer.chat_template:
        return False
    text = tokenizer.get_chat_template(None, None)
    return probe_template(text, variables=tokenizer.special_tokens_map, where="chat template").content_as_parts


def _template_error() -> type[Exception]:
    import jinja2

    return jinja2.TemplateError


def _stop_ids(folder: Path | None) -> set[int]:
    """`eos_token_id` of a model folder's configuration and generation settings."""
    found: set[int] = set()
    for name in _CONFIGS if folder is not None else ():
        path = folder / name  # type: ignore[operator]
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found |= {int(one) for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
    return found

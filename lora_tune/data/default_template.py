"""The chat template that a base without one gets: "lora_tune plain"."""

from __future__ import annotations

from typing import Literal

DEFAULT_TEMPLATE_NAME = "lora_tune plain"

# Needs no new tokens: headers are words, and the tokenizer's own eos ends an answer. A single newline stands before the
# answer, because byte-level tokenizers would join two newlines, or a newline with a following space, into one token.
_BODY = """\
{%- if tools %}
{{- '### Tools:\\n' }}
{%- for tool in tools %}
{{- tool | tojson + '\\n' }}
{%- endfor %}
{{- '\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role not in ('system', 'user', 'assistant', 'tool') %}
{{- raise_exception('unknown role ' + message.role) }}
{%- endif %}
{{- '### ' + message.role | capitalize + ':\\n' + (message.content or '') }}
{%- if message.role == 'assistant' %}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '</tool_call>' }}
{%- endfor %}
{{- eos_token }}
{%- endif %}
{{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Assistant:\\n' }}
{%- endif %}"""


def default_template(*, start: Literal["bos", "nothing"]) -> str:
    """The text of "lora_tune plain" for a tokenizer that puts a bos token before a text, or nothing.

    It renders `### User:\\n…\\n\\n### Assistant:\\n…<eos>\\n\\n`: roles system, user, assistant, tool; tools as JSON.
    """
    return ("{{- bos_token }}\n" if start == "bos" else "") + _BODY

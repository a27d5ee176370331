"""Conversations to token ids and loss mask, by the base's own chat template: for training, preview and serving.

No list of known templates is involved. One probe of the template (`template_check.py`) shows how it ends a turn
(`turn_end.py`); each assistant turn begins where its generation prompt ends (`turn_drafts.py`); the text is encoded in
segments (`segment_encoder.py`).

A conversation becomes one row if every trained turn, and the prompt before it, are prefixes of the whole render, in
characters and in tokens. Otherwise (thinking templates that rewrite earlier turns, a last turn that ends differently,
no end token at all) every trained turn becomes a row of its own, note `per_turn`: prompt, then answer. So in each row
the ids before the first trained token are `prompt_ids(messages before it)`, token by token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2.nodes
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from lora_tune.data.conversation import Conversation, Message
from lora_tune.data.default_template import DEFAULT_TEMPLATE_NAME, default_template
from lora_tune.data.segment_encoder import LiteralError, Segment, SegmentEncoder
from lora_tune.data.template_check import TemplateProbe, probe_template
from lora_tune.data.turn_drafts import CannotRender, Draft, LossOn, TurnDrafter
from lora_tune.data.turn_end import choose_pad_id, find_turn_end, own_eos_id
from lora_tune.errors import CheckFailed

NOTES = ("straddles", "control_tokens", "per_turn", "no_trained_token")
_BATCH = 256  # conversations whose segments are encoded together


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """One training row: `input_ids` (T,) int32 and `mask` (T,) bool, True where the token is trained.

    `source`, `file`, `line`, `task` and `template` are those of the conversation (the last two where a row is looked at
    by itself). `notes` is a subset of `NOTES`: `straddles` (a token
    would span prompt and answer, so they are encoded apart, as serving does), `control_tokens` (somebody's words hold
    a control token, which is encoded as plain text), `per_turn` (one row per assistant turn), `no_trained_token`.
    """

    input_ids: np.ndarray
    mask: np.ndarray
    source: int
    file: str
    line: int
    notes: frozenset[str]
    task: str = ""
    template: str = ""


@dataclass(frozen=True, slots=True)
class RowError:
    """Stands in place of a conversation's rows where the template cannot render it; `reason` is one line."""

    reason: str


class ChatTemplate:
    """A chat template with its tokenizer: rows to train on, prompts to serve, answers to read.

    Made by `load_chat_template`. `text` is the template in use and `sha256` its hash; `eos_id` is the token that ends
    an assistant's turn, `stop_ids` (it first) are all at which generation ends, `pad_id` differs from it wherever the
    vocabulary allows; `is_default`: the base has no template and got "lora_tune plain". `notices` are odd but usable
    traits, for the user to read.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, probe: TemplateProbe, is_default: bool, where: str
    ) -> None:
        self.tokenizer = tokenizer
        self.text: str = tokenizer.get_chat_template(None, None)
        self._tool_text: str = tokenizer.get_chat_template(None, [{}])
        both = self.text if self._tool_text == self.text else f"{self.text}\0{self._tool_text}"
        self.sha256 = hashlib.sha256(both.encode("utf-8", "surrogatepass")).hexdigest()
        self.writes_date = "strftime_now" in both
        self.is_default = is_default
        self.notices = probe.notices
        self._lead = probe.lead
        self._encoder = SegmentEncoder(
            tokenizer, control_tokens=_control_tokens(tokenizer, (self.text, self._tool_text))
        )
        self._own_eos_id = own_eos_id(tokenizer)
        self._end = find_turn_end(probe, self._encoder, eos_id=self._own_eos_id, where=where)
        self.eos_id, self.stop_ids = self._end.eos_id, self._end.stop_ids
        self.pad_id = choose_pad_id(tokenizer, stop_ids=self.stop_ids, template_text=both)
        self._bos_id = int(tokenizer.bos_token_id) if starts_with_bos(tokenizer) else None
        self._align_tokenizer()
        self._drafter = TurnDrafter(tokenizer, probe=probe, encoder=self._encoder, end=self._end)

    def rows(self, conversations: Sequence[Conversation], *, loss_on: LossOn) -> list[list[TokenRow] | RowError]:
        """One entry per conversation: its rows, or why the template cannot render it.

        `loss_on`: `assistant` trains every assistant turn whose weight is not 0, `last_assistant` only the last turn of
        them, `all` every token but a leading bos (and turns of weight 0). A text without turns is encoded as it is,
        with the tokenizer's bos where it uses one, then eos; all but bos is trained.
        """
        found: list[list[TokenRow] | RowError] = []
        for start in range(0, len(conversations), _BATCH):
            batch = conversations[start : start + _BATCH]
            entries = [self._drafts(conversation, loss_on) for conversation in batch]
            self._prepare([draft for entry in entries if not isinstance(entry, RowError) for draft in entry])
            for conversation, entry in zip(batch, entries, strict=True):
                found.append(entry if isinstance(entry, RowError) else self._encode(conversation, entry, loss_on))
            self._encoder.forget()
        return found

    @property
    def ends(self) -> str:
        """The tokens at the ends of rows; the eos that the tokenizer had is in none of its settings after `align`."""
        return f"{self._bos_id} {self._own_eos_id} {self.stop_ids}"

    def prompt_ids(self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """What the model is fed before it answers: the turns so far and the generation prompt.

        Raises:
            CheckFailed: the template refuses or drops one of the turns.
        """
        try:
            inputs = self._drafter.inputs(Conversation(messages=tuple(messages), tools=tuple(tools)))
            segments = self._encoder.segments(self._drafter.render(inputs, then="prompt"), marks=inputs.marks)
            self._encoder.prepare((segment.kind, segment.text) for segment in segments)
            return [token for segment in segments for token in self._encoder.ids(segment.kind, segment.text)]
        except (CannotRender, LiteralError) as error:
            raise CheckFailed(f"chat template: {error}", "change the conversation") from None
        finally:
            self._encoder.forget()

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The text of `prompt_ids`, for words without control tokens. Raises: CheckFailed as `prompt_ids`."""
        try:
            return self._drafter.render(self._drafter.inputs(Conversation(messages=tuple(messages))), then="prompt")
        except CannotRender as error:
            raise CheckFailed(f"chat template: {error}", "change the conversation") from None

    def decode_answer(self, ids: Iterable[int]) -> str:
        """The text of a generated answer, without end token, special tokens and what the template puts around it."""
        kept: list[int] = []
        for token in ids:
            if int(token) in self.stop_ids:
                break
            kept.append(int(token))
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        closing_words = self._encoder.control_re.sub("", self._end.text)
        return text.removeprefix(self._lead).removesuffix(closing_words).strip()

    def align(self, model: Any) -> None:
        """Set eos and pad of `model.config` (and its text part) and `model.generation_config` to the template's.

        Stop tokens that the generation configuration has already (GLM-4 has three) stay; bos is left alone.
        """
        for config in (model.config, getattr(model.config, "text_config", None)):
            if config is not None:
                config.eos_token_id, config.pad_token_id = self.eos_id, self.pad_id
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            known = generation.eos_token_id
            known = [] if known is None else known if isinstance(known, list | tuple) else [known]
            stops = list(dict.fromkeys([*self.stop_ids, *known]))
            generation.eos_token_id = stops[0] if len(stops) == 1 else stops
            generation.pad_token_id = self.pad_id
        self._align_tokenizer()

    def _align_tokenizer(self) -> None:
        """eos and pad of the tokenizer. eos stays where the template writes `eos_token`: its text would change."""
        name = self.tokenizer.convert_ids_to_tokens
        writes_eos = any("eos_token" in text for text in (self.text, self._tool_text))
        if self.tokenizer.eos_token_id != self.eos_id and (not writes_eos or self.tokenizer.eos_token_id is None):
            self.tokenizer.eos_token = name(self.eos_id)
        if self.tokenizer.pad_token_id != self.pad_id:
            self.tokenizer.pad_token = name(self.pad_id)

    def _drafts(self, conversation: Conversation, loss_on: LossOn) -> list[Draft] | RowError:
        if conversation.text is None:
            try:
                return self._drafter.drafts(conversation, loss_on=loss_on)
            except CannotRender as error:
                return RowError(str(error))
        marked = self._encoder.has_control_token(conversation.text)
        text = self._encoder.mark(conversation.text) if marked else conversation.text
        eos_id = self.eos_id if self._own_eos_id is None else self._own_eos_id
        return [Draft(text, [], "marks" if marked else "no marks", added_ids=(eos_id,), whole=True, lone_text=True)]

    def _prepare(self, drafts: Sequence[Draft]) -> None:
        """Encode, in one batch, all segments of these drafts and the beginnings of those that a turn's edge divides."""
        keys = []
        for draft in drafts:
            draft.segments = self._encoder.segments(draft.text, marks=draft.marks)
            keys += [segment[:2] for segment in draft.segments]
            for segment, edge in _divided(draft.segments, draft.spans):
                keys.append((segment.kind, segment.text[: edge - segment.start]))
        self._encoder.prepare(keys)

    def _encode(
        self, conversation: Conversation, drafts: Sequence[Draft], loss_on: LossOn
    ) -> list[TokenRow] | RowError:
        try:
            rows = [self._row(conversation, draft) for draft in drafts]
            if any(row is None for row in rows):  # a token spans prompt and answer in the midst: one row per turn
                rows = [
                    self._row(conversation, draft)
                    for draft in self._drafter.row_per_turn(conversation, loss_on=loss_on)
                ]
        except (CannotRender, LiteralError) as error:
            return RowError(str(error))
        return [row for row in rows if row is not None]

    def _row(self, conversation: Conversation, draft: Draft) -> TokenRow | None:
        """The row of a draft, or None where several turns share it and a token spans the edge of one of them."""
        edges = [edge for span in draft.spans for edge in span]
        cuts: set[int] = set()
        ids, places = self._ids_and_places(draft, cuts)
        while missing := [edge for edge in edges if edge not in places]:
            if len(draft.spans) > 1 and not draft.whole:
                return None
            cuts.add(missing[0])
            ids, places = self._ids_and_places(draft, cuts)
        mask = np.full(len(ids) + len(draft.added_ids), draft.whole)
        for start, end in draft.spans:
            mask[places[start] : places[end]] = not draft.whole
        mask[len(ids) :] = True
        ids = [*ids, *draft.added_ids]
        if draft.lone_text and self._bos_id is not None:
            ids, mask = [self._bos_id, *ids], np.concatenate(([False], mask))
        if ids and draft.whole and ids[0] == self.tokenizer.bos_token_id:
            mask[0] = False
        notes = (
            draft.notes | ({"straddles"} if cuts else set()) | ({"control_tokens"} if draft.marks == "marks" else set())
        )
        notes |= set() if mask.any() else {"no_trained_token"}
        where = (conversation.source, conversation.file, conversation.line)
        return TokenRow(np.asarray(ids, dtype=np.int32), mask, *where, frozenset(notes))

    def _ids_and_places(self, draft: Draft, cuts: Iterable[int]) -> tuple[list[int], dict[int, int]]:
        """The ids of a draft cut at `cuts`, and for each edge (characters) its place (tokens) unless a token spans it.

        An edge inside a segment has a place only if the segment's beginning, encoded alone as serving would, gives the
        same ids as it does within the segment.
        """
        ids: list[int] = []
        places: dict[int, int] = {}
        segments = draft.segments
        if cuts or not segments:
            segments = self._encoder.segments(draft.text, marks=draft.marks, cuts=cuts)
        for segment in segments:
            places[segment.start] = len(ids)
            ids += self._encoder.ids(segment.kind, segment.text)
        for segment, edge in _divided(segments, draft.spans):
            head = self._encoder.ids(segment.kind, segment.text[: edge - segment.start])
            if self._encoder.ids(segment.kind, segment.text)[: len(head)] == head:
                places[edge] = places[segment.start] + len(head)
        places[len(draft.text)] = len(ids)
        return ids, places


def load_chat_template(
    tokenizer: PreTrainedTokenizerBase, *, template: str | None = None, data: Literal["plain", "tools"] = "plain"
) -> ChatTemplate:
    """The chat template of a base, checked, and the tokenizer aligned with it (its template, eos and pad are set).

    `template` is the text of a file that the recipe names and replaces the base's own; a base without any gets
    "lora_tune plain" (default_template.py). `data`: "tools" where it has tools, so that a template that drops
    them is no use.

    Raises:
        CheckFailed: the template fails, drops words (or tools where the data has them), loops, writes too much, reaches
            for Python's internals, adds nothing, or no end of a turn can be told.
    """
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    where = "base.chat_template" if template is not None else name
    if template is not None:
        tokenizer.chat_template = template
    is_default = not tokenizer.chat_template
    if is_default:
        where = f"{name}: {DEFAULT_TEMPLATE_NAME}"
        eos_id = own_eos_id(tokenizer)
        if eos_id is None:
            raise CheckFailed(f"{name}: the tokenizer has no chat template and no eos token", "give base.chat_template")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_id)
        tokenizer.chat_template = default_template(start="bos" if starts_with_bos(tokenizer) else "nothing")
    texts = [_text_for(tokenizer, with_tools, where) for with_tools in (False, True)]
    probe, *other = [
        probe_template(text, variables=tokenizer.special_tokens_map, where=where) for text in dict.fromkeys(texts)
    ]
    probe = probe.with_tools_of(other[0]) if other else probe
    lost = sorted(probe.drops & {"tools", "tool_calls", "tool"})
    if data == "tools" and (lost or probe.tools_error):
        reason = f"it fails with tools: {probe.tools_error}" if probe.tools_error else f"it drops {' and '.join(lost)}"
        raise CheckFailed(
            f"{where}: the chat template is refused: {reason}, but the data has tools", "use another template"
        )
    return ChatTemplate(tokenizer, probe=probe, is_default=is_default, where=where)


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer puts its bos token before a text of its own accord."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _text_for(tokenizer: PreTrainedTokenizerBase, tools: bool, where: str) -> str:
    """The template that transformers takes from a tokenizer: of several, `tool_use` with tools, else `default`."""
    try:
        return str(tokenizer.get_chat_template(None, [{}] if tools else None))
    except ValueError as error:
        raise CheckFailed(f"{where}: the chat template is refused: {error}", "give base.chat_template") from None


def _control_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> tuple[str, ...]:
    """The tokens that only the template may write: special ones, and other added tokens that stand in its literal text.

    Source: `_get_control_tokens` of transformers (`tokenizer.chat_control_tokens` names them where it is set).
    """
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    named = getattr(tokenizer, "chat_control_tokens", None)
    literals = named if named is not None else "\0".join(map(_literal_text, dict.fromkeys(texts)))
    return tuple(token.content for token in added if token.special or token.content in literals)


def _literal_text(template: str) -> str:
    """The text and the string constants of a template, joined with null characters."""
    tree = _compile_jinja_template(template).environment.parse(template)
    found = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    found |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return "\0".join(found)


def _divided(segments: Sequence[Segment], spans: Iterable[tuple[int, int]]) -> Iterator[tuple[Segment, int]]:
    """The edges of spans that fall inside a segment, with it; segments and edges in order."""
    edges = sorted(edge for span in spans for edge in span)
    at = 0
    for segment in segments:
        while at < len(edges) and edges[at] < segment.end:
            if edges[at] > segment.start:
                yield segment, edges[at]
            at += 1

"""The compare page at `/`: its files, and the three small endpoints that it has beside OpenAI's API.

`GET /compare/adapters` what is served, with scores; `POST /compare/tokens` a prompt as the training template writes it;
`POST /compare/votes` a vote as rows for preference training. Only the page's files (`SHELL`) are for everybody: they
hold no data, and ask for the token where the server wants one. Bodies are read and parsed by the guard before.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_tune.serving.asked import ChatAsked, read_chat
from lora_tune.serving.backend import Backend
from lora_tune.serving.json_body import body_of
from lora_tune.serving.prompting import Prompting
from lora_tune.serving.refusals import Refusal, bad, without_paths
from lora_tune.serving.settings import Caps
from lora_tune.serving.votes import (
    PreferenceRow,
    UndecidedRow,
    Verdict,
    VotedAnswer,
    VotesBusy,
    VotesFull,
    append_rows,
    facts_of_vote,
    preferences,
    undecided,
    undecided_file,
)

SAMPLING = frozenset({"temperature", "top_p", "max_tokens", "seed"})  # what a vote keeps of it
MOST_TOKENS = 8192  # of a prompt that are shown one by one
_LONGEST = 8  # tokens of one piece
_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES: dict[str, Path] = {
    "/" if path.name == "index.html" else f"/page/{path.name}": path
    for path in sorted(_FOLDER.iterdir())
    if path.suffix in _TYPES
}
SHELL = frozenset(FILES)
"""Paths of the page's files, which need no token."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}


_FRESH = {"cache-control": "no-store"}


class _Vote(BaseModel):
    """The body of `/compare/votes`. `messages` and `sampling` are those of the chat request, the same for all."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    messages: list[dict[str, Any]]
    answers: Annotated[list[VotedAnswer], Field(min_length=2, max_length=3)]
    verdict: Verdict
    best: Annotated[int, Field(ge=0)] | None = None
    sampling: dict[str, Any] = {}


def router(backend: Backend, *, prompting: Prompting, votes: Path | None, caps: Caps) -> APIRouter:
    """The routes of the page. Without a file for `votes` the page asks for none."""
    routes = APIRouter()
    for path, file in FILES.items():
        routes.add_api_route(path, _sender(file), methods=["GET", "HEAD"], include_in_schema=False)

    @routes.get("/compare/adapters")
    async def adapters() -> JSONResponse:
        models = [
            {**model.facts, "name": model.name, "parent": model.parent, "context": model.context}
            for model in backend.models()
        ]
        content = {"models": models, "votes": votes is not None, "max_tokens": caps.max_tokens}
        return JSONResponse(content, headers=_FRESH)

    @routes.post("/compare/tokens")
    async def tokens(request: Request) -> JSONResponse:
        asked = read_chat(body_of(request), caps=caps, temperature=0.0)
        return JSONResponse(await prompt_as_tokens(backend, prompting, asked))

    @routes.post("/compare/votes")
    async def vote(request: Request) -> JSONResponse:
        if votes is None:
            raise Refusal(404, "this server keeps no votes")
        return JSONResponse({"rows": await save_vote(backend, body_of(request), votes=votes, caps=caps)})

    return routes


async def prompt_as_tokens(backend: Backend, prompting: Prompting, asked: ChatAsked) -> dict[str, Any]:
    """What the model is fed for a chat request: `count` tokens in `pieces` of {ids, text, special}, and the template.

    A piece is one token, or the few that share a character. Of more than `MOST_TOKENS` the middle is `left_out`.

    Raises: UnknownModel; Refusal where the template refuses the conversation.
    """
    chat = backend.chat(asked.model)
    ids, _ = await prompting.chat(asked)
    parts = [ids] if len(ids) <= MOST_TOKENS else [ids[: MOST_TOKENS // 2], ids[-MOST_TOKENS // 2 :]]
    special = {number for number, token in chat.tokenizer.added_tokens_decoder.items() if token.special}

    def found() -> list[TokenPiece]:
        decode = chat.tokenizer.decode
        return [piece for part in parts for piece in pieces_of(part, special=special, decode=decode)]

    return {
        "model": asked.model,
        "template_sha256": chat.sha256,
        "count": len(ids),
        "left_out": len(ids) - sum(map(len, parts)),
        "left_out_after": len(parts[0]),
        "pieces": [
            {"ids": piece.ids, "text": piece.text, "special": piece.ids[0] in special}
            for piece in await prompting.run(found)
        ],
    }


class TokenPiece(NamedTuple):
    """Neighbouring tokens that only together are text: mostly one."""

    ids: list[int]
    text: str


def pieces_of(ids: Sequence[int], *, special: Set[int], decode: Callable[..., Any]) -> Iterator[TokenPiece]:
    """The tokens one by one, each with what it adds to the text before it; parts of one character come together.

    All texts together are the decoded ids. `decode` is a tokenizer's.
    """

    def text_of(start: int, end: int) -> str:
        return str(decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before, done = 0, 0  # the last piece begins at `before`, and ends where the next one begins: at `done`
    for end in range(1, len(ids) + 1):
        known, text = text_of(before, done), text_of(before, end)
        alone = ids[end - 1] in special or end == len(ids) or ids[end] in special or end - done == _LONGEST
        if not alone and (len(text) <= len(known) or text.endswith("\ufffd")):
            continue
        yield TokenPiece(list(ids[done:end]), text[len(known) :])
        before, done = done, end


async def save_vote(backend: Backend, content: Mapping[str, Any], *, votes: Path, caps: Caps) -> int:
    """Check a vote and write it; returns how many preferences it holds.

    Raises: Refusal for a body that does not do, an unknown model, a preference between equal answers, a full file.
    """
    given = _checked(content)
    as_asked = {**given.sampling, "model": given.answers[0].model, "messages": given.messages}
    asked = read_chat(as_asked, caps=caps, temperature=0.0)
    served = {model.name for model in backend.models()}
    for number, answer in enumerate(given.answers):
        if answer.model not in served:
            raise Refusal(404, f"answers.{number}.model: no model {answer.model[:64]!r} is served", param="model")
    wanted = asked.wanted
    templates = {backend.chat(answer.model).sha256 for answer in given.answers}
    facts = facts_of_vote(
        base=next(model.name for model in backend.models() if model.parent is None),
        template_sha256=templates.pop() if len(templates) == 1 else None,
        sampling=(wanted.temperature, wanted.top_p, wanted.max_tokens, wanted.seed),
        prompt=asked.messages,
    )
    rows: Sequence[PreferenceRow | UndecidedRow]
    if given.verdict == "better":
        file, rows = votes, preferences(given.answers, given.best or 0, facts)
    else:
        file, rows = undecided_file(votes), [undecided(given.answers, given.verdict, facts)]
    try:
        await asyncio.to_thread(append_rows, file, rows)
    except VotesFull as error:
        raise Refusal(507, without_paths(str(error))) from None
    except VotesBusy as error:
        raise Refusal(503, without_paths(str(error)), headers={"retry-after": "1"}) from None
    return len(rows) if file == votes else 0


def _checked(content: Mapping[str, Any]) -> _Vote:
    """Raises: Refusal naming the field that is wrong."""
    try:
        given = _Vote.model_validate(content)
    except ValidationError as error:
        issue = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in issue["loc"])[:80] or "body"
        raise bad(place, issue["msg"][:1].lower() + issue["msg"][1:]) from None
    if unknown := set(given.sampling) - SAMPLING:
        raise bad("sampling", f"knows {', '.join(sorted(SAMPLING))}, got {sorted(unknown)[0][:40]!r}")
    if (given.verdict == "better") != (given.best is not None):
        raise bad("best", "names the better answer, from 0, where verdict is better, and only there")
    if given.best is not None:
        if given.best >= len(given.answers):
            raise bad("best", f"there are {len(given.answers)} answers, counted from 0, got {given.best}")
        if not given.answers[given.best].content.strip():
            raise bad("best", "this answer is empty, which nobody should learn; vote tie or bad")
        if len({answer.content for answer in given.answers}) == 1:
            raise bad("best", "all answers are equal, which is no preference; vote tie or bad")
    return given


def _sender(file: Path) -> Callable[[Request], Awaitable[Response]]:
    """A route that sends one file of the page, which is read once."""
    content = file.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": etag}

    async def send(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=_TYPES[file.suffix])

    return send

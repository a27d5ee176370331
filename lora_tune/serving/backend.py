"""What a server of models can do: the protocol between the engines below and HTTP, chat and the page above.

Cold: only types. `LocalBackend` (local.py) is the embedded engine; whoever talks to models takes a `Backend`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lora_tune.errors import LoraTuneError

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate

Response = Literal["text", "json_object"]
Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer is made. `temperature` 0 takes the most likely token; above it tokens are drawn from the `top_k`
    most likely (0: all), and of these from the smallest set whose probability reaches `top_p`.

    With a `seed` the same request gives the same answer, whoever else is being answered; None draws afresh. `logprobs`
    is None for none, else how many alternatives (0 to 20) come beside the log-probability of every token. Both are
    those of the model itself, before temperature and cuts. `json_object` allows only tokens that go on to one whole
    JSON object.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    response: Response = "text"


@dataclass(frozen=True, slots=True)
class Request:
    """One answer that is wanted. `model` is the base's name or an adapter's; `prompt_ids` end where the answer begins.

    Several answers to one prompt are several requests.
    """

    model: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token and its natural log-probability. `text` has U+FFFD where the token is part of a character; `data` are
    its true bytes. `top` are the most likely tokens at this place, the likeliest first.
    """

    id: int
    text: str
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token, or several, added to the answer.

    `text` may be "" while a character or what may become a stop string is incomplete; all texts together are the
    answer, without stop string and stop token. `ids` are the tokens that were made since the last piece, without the
    stop token.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer, always the last item. `completion_tokens` counts a stop token too."""

    reason: Reason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that answers. `parent` is the base's name, None for the base itself.

    `facts` may be shown to everyone: of an adapter its method, rank and `scores`; nothing in it is a path. `created` is
    in seconds since 1970. `context` is how many tokens prompt and answer may have together.
    """

    name: str
    parent: str | None
    created: int
    context: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Counters:
    """What one model has done since the start."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cancelled: int = 0
    failed: int = 0
    """Requests that ended with an exception of the engine."""
    running: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Statistics:
    """The engine at this moment, and since its start."""

    running: int
    """Requests that are being answered, their prompts read or not."""
    waiting: int
    """Requests in the queue."""
    queue: int
    """How many may wait."""
    steps: int
    """Decoding steps so far."""
    step_rows: int
    """Rows of all these steps together: `step_rows / steps` is the mean batch."""
    step_s: float
    """Seconds that they took."""
    prefill_tokens: int
    """Tokens of prompts that were read so far."""
    models: Mapping[str, Counters] = field(default_factory=dict)


class QueueFull(LoraTuneError):
    """As many requests wait as may (HTTP 429)."""


class Draining(LoraTuneError):
    """The engine is about to stop and takes no new requests (HTTP 503)."""


class UnknownModel(LoraTuneError):
    """No model of this name is served (HTTP 404)."""


class TooLong(LoraTuneError):
    """Prompt and answer together exceed the context of the model (HTTP 400)."""


class Unsupported(LoraTuneError):
    """The engine cannot do what the request asks for (HTTP 400)."""


class EngineFailed(LoraTuneError):
    """The engine failed on this request, and goes on with all others (HTTP 500); the cause is in the log alone."""


class Backend(Protocol):
    """Models that answer. All methods are called from one event loop; they never block it for long."""

    def models(self) -> list[ServedModel]:
        """The base first, then the adapters by name."""

    def chat(self, model: str) -> ChatTemplate:
        """The template that renders for this model, as in training. Not for two threads at once.

        Raises: UnknownModel.
        """

    def stream(self, request: Request) -> AsyncGenerator[Piece | Finished, None]:
        """The answer, piece by piece, then Finished. Closing the iterator (`aclose`) cancels the request.

        The first item is awaited until the request has left the queue. Raises, at the first item: UnknownModel,
        QueueFull, Draining, TooLong, Unsupported; at any: EngineFailed.
        """

    async def load(self, name: str, folder: Path) -> None:
        """Verify an adapter folder and serve it under this name, while others are being answered.

        Raises: CheckFailed where the folder is refused or does not belong to this base, UsageError for a name that is
        taken.
        """

    async def unload(self, name: str) -> None:
        """Serve this adapter no more: its waiting requests end with UnknownModel, its running ones are finished first.

        Raises: UnknownModel.
        """

    def statistics(self) -> Statistics:
        """What the engine does and did."""

    async def close(self, *, grace_s: float) -> None:
        """Take no new requests, finish the running ones for at most so many seconds, cancel the rest, and stop."""

"""The embedded engine: one base in memory and any number of adapters on it, answering together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

import psutil
import torch

from lora_tune.adapter.folder import MANIFEST, read_manifest
from lora_tune.adapter.load import live_shapes, read_checked
from lora_tune.adapter.verify import verify_folder
from lora_tune.adapter.words import TOKENIZER
from lora_tune.data.chat_template import ChatTemplate, load_chat_template
from lora_tune.errors import CheckFailed, LoraTuneError, UsageError
from lora_tune.model.base import load_base
from lora_tune.model.shape import read_shape
from lora_tune.model.source import BaseSource, find_base, load_tokenizer
from lora_tune.model.tokenizer import read_tokenizer
from lora_tune.recipe import Base
from lora_tune.serving.answer_text import Vocabulary
from lora_tune.serving.backend import Finished, Piece, Request, ServedModel, Statistics, TooLong, UnknownModel
from lora_tune.serving.engine import Engine, Limits
from lora_tune.serving.grammar import Grammars
from lora_tune.serving.job import Job
from lora_tune.serving.runner import Runner
from lora_tune.serving.settings import MODEL_NAME

if TYPE_CHECKING:
    from lora_tune.model.methods import SavedAdapter

_log = logging.getLogger(__name__)
_CACHE_SHARE = 0.6  # of the memory that is free behind the base, for keys and values of running rows
_CPU_CACHE_BYTES = 2 << 30  # and on a CPU at most this


@dataclass(frozen=True)
class _Words:
    """A template with what the engine needs of its tokenizer."""

    chat: ChatTemplate
    vocabulary: Vocabulary
    grammars: Grammars


@dataclass(frozen=True)
class _Served:
    """A model that answers; `adapter` is its name in PEFT, None for the base."""

    model: ServedModel
    words: _Words
    adapter: str | None
    own_batch: Literal["own batch", "shared batch"]
    logits: int


class LocalBackend:
    """A Backend (see backend.py) on real parts in this process. Made by `start`."""

    def __init__(self, source: BaseSource, base: Base, *, engine: Engine, words: _Words, served: _Served) -> None:
        self._source, self._base, self._engine = source, base, engine
        self._words = WeakValueDictionary({_key_of(source.folder): words})  # they go with the last model that has them
        self._served: dict[str, _Served] = {served.model.name: served}
        self._name, self._loading = served.model.name, set[str]()
        self._shapes: Mapping[str, tuple[int, ...]] = {}

    @staticmethod
    def start(
        base: Base,
        *,
        adapters: Mapping[str, Path],
        limits: Limits | None = None,
        name: str | None = None,
        trust_remote_code: str | None = None,
    ) -> LocalBackend:
        """Load the base and these adapters, each verified, and start the worker.

        `name` is what the base is served as, by default its own name.

        Raises: what loading a base raises; CheckFailed where an adapter is refused, UsageError for its name.
        """
        limits = limits or Limits()
        source = find_base(base, trust_remote_code=trust_remote_code)
        model = load_base(source, base, trust_remote_code=trust_remote_code)
        template = Path(base.chat_template).read_text(encoding="utf-8") if base.chat_template else None
        chat = load_chat_template(load_tokenizer(source, trust_remote_code=trust_remote_code), template=template)
        shape = read_shape(model.config.to_dict())
        per_token = 2 * shape.layers * shape.key_value * model.dtype.itemsize
        context = min(limits.context or shape.positions, shape.positions)
        words = _words(chat)
        about = ServedModel(name or source.name, None, int(time.time()), context, _facts(source, base))
        rows = int(model.get_input_embeddings().weight.shape[0])
        engine = Engine(Runner(model), limits, cache_tokens=limits.cache_tokens or _free_bytes() // per_token)
        served = _Served(about, words, None, "shared batch", rows)
        backend = LocalBackend(source, base, engine=engine, words=words, served=served)
        backend._shapes = live_shapes(model)
        try:
            read = [(adapter, *backend._read(backend._named(adapter, folder))) for adapter, folder in adapters.items()]
            for adapter, saved, found, facts in sorted(read, key=lambda one: -len(_new_tokens(one[1]))):
                done = engine.call(lambda runner, saved=saved: runner.attach(saved))  # type: ignore[misc]
                backend._serve(adapter, found, facts, attached=done.result(), saved=saved)
        except BaseException:
            engine.stop()
            raise
        return backend

    def models(self) -> list[ServedModel]:
        """The base first, then the adapters by name."""
        return [self._served[self._name].model] + [
            self._served[name].model for name in sorted(self._served) if name != self._name
        ]

    def chat(self, model: str) -> ChatTemplate:
        """The template that renders for this model. Raises: UnknownModel."""
        return self._known(model).words.chat

    def _known(self, model: str) -> _Served:
        served = self._served.get(model)
        if served is None:
            raise UnknownModel("no model of this name is served", "GET /v1/models lists them")
        return served

    async def stream(self, request: Request) -> AsyncGenerator[Piece | Finished, None]:
        """The answer, piece by piece, then Finished (see Backend.stream)."""
        job = await self._job(request)
        self._engine.submit(job)
        try:
            while True:
                item = await job.items.get()
                if isinstance(item, LoraTuneError):
                    raise item
                yield item
                if isinstance(item, Finished):
                    return
        finally:
            if not job.ended:
                self._engine.cancel(job)

    async def _job(self, request: Request) -> Job:
        served, sampling = self._known(request.model), request.sampling
        needed, context = len(request.prompt_ids) + sampling.max_new_tokens, served.model.context
        if not request.prompt_ids or sampling.max_new_tokens < 1:
            raise UsageError("a request needs a prompt and room for an answer, got none", "ask for something")
        if needed > context:
            reason = f"the prompt has {len(request.prompt_ids)} tokens and {sampling.max_new_tokens} more are asked for"
            raise TooLong(f"{reason}, got {needed} in a context of {context}", "shorten the prompt or max_tokens")
        if not all(0 <= token < served.logits for token in request.prompt_ids):
            raise UsageError(f"a prompt may hold tokens from 0 to {served.logits - 1}", "use the model's tokenizer")
        grammar = None
        if sampling.response == "json_object":
            grammar = await asyncio.to_thread(served.words.grammars.json_object, vocabulary=served.logits)
            if self._known(request.model) is not served:  # it went meanwhile, and another came
                raise UnknownModel("this model has just been unloaded", "ask again")
        return Job(
            request,
            served.adapter,
            served.own_batch,
            served.words.vocabulary,
            served.logits,
            asyncio.get_running_loop(),
            asyncio.Queue(),
            grammar,
        )

    async def load(self, name: str, folder: Path) -> None:
        """Verify an adapter folder and serve it under this name (see Backend.load)."""
        self._check_name(name)
        self._loading.add(name)
        await asyncio.shield(self._load(name, folder))  # whoever asked may leave: what is begun is finished

    async def _load(self, name: str, folder: Path) -> None:
        try:
            saved, words, facts = await asyncio.to_thread(self._read, folder)
            done = self._engine.call(lambda runner: runner.attach(saved))
            self._serve(name, words, facts, attached=await asyncio.wrap_future(done), saved=saved)
        finally:
            self._loading.discard(name)

    async def unload(self, name: str) -> None:
        """Serve this adapter no more (see Backend.unload)."""
        served = self._known(name)
        if served.adapter is None:
            raise UsageError(f"{name!r} is the base, which stays", "name an adapter")
        del self._served[name]
        await asyncio.wrap_future(self._engine.remove(served.adapter))

    def statistics(self) -> Statistics:
        """What the engine does and did."""
        return self._engine.statistics()

    async def close(self, *, grace_s: float) -> None:
        """Take no new requests, finish the running ones for at most so many seconds, cancel the rest, and stop."""
        drained = asyncio.wrap_future(self._engine.drain())
        await asyncio.wait([drained], timeout=grace_s)
        await asyncio.to_thread(self._engine.stop)
        await asyncio.sleep(0)  # what was handed over last is taken

    # ----- adapters -----
    def _named(self, name: str, folder: Path) -> Path:
        self._check_name(name)
        return folder

    def _check_name(self, name: str) -> None:
        if not MODEL_NAME.fullmatch(name):
            what = "small letters, digits, - and _, at most 64"
            raise UsageError(f"an adapter's name must be made of {what}, got {name[:80]!r}", "choose another name")
        if name in self._served or name in self._loading:
            raise UsageError(f"a model named {name!r} is served already", "unload it first, or choose another name")

    def _read(self, folder: Path) -> tuple[SavedAdapter, _Words, dict[str, Any]]:
        """Verify a folder and read it, without the model: its tensors, its words, its public facts."""
        report = verify_folder(folder, base=self._base, depth="quick")
        if report.errors:
            raise CheckFailed(report.errors)
        saved = read_checked(folder, shapes=self._shapes)
        kept = ("method", "rank", "alpha", "scores", "parameters")
        facts = {key: report.facts[key] for key in kept if key in report.facts}
        return saved, self._words_of(folder), facts

    def _words_of(self, folder: Path) -> _Words:
        """The template that the adapter was trained with; the base's where the folder does not vouch for one."""
        if not (folder / MANIFEST).exists() or not (folder / TOKENIZER).exists():
            return self._served[self._name].words
        manifest = read_manifest(folder)
        key = _key_of(folder)
        words = self._words.get(key)
        if words is None:
            words = self._words[key] = _words(load_chat_template(read_tokenizer(folder, name=folder.name)))
        if words.chat.sha256 != manifest.chat.template_sha256:
            raise CheckFailed(f"{folder.name}: its chat template is not the one that it was trained with")
        return words

    def _serve(
        self, name: str, words: _Words, facts: dict[str, Any], *, attached: tuple[str, bool], saved: SavedAdapter
    ) -> None:
        base, (adapter, mixable) = self._served[self._name], attached
        about = ServedModel(name, self._name, int(time.time()), base.model.context, facts)
        logits = max([base.logits, *(token + 1 for token in _new_tokens(saved))])
        self._served[name] = _Served(about, words, adapter, "shared batch" if mixable else "own batch", logits)


def _new_tokens(saved: SavedAdapter) -> list[int]:
    """The tokens that an adapter trains; some of them may have no row in the base."""
    trained = saved.config.get("trainable_token_indices") or {}
    return [token for ids in (trained.values() if isinstance(trained, Mapping) else [trained]) for token in ids]


def _words(chat: ChatTemplate) -> _Words:
    return _Words(chat, Vocabulary(chat), Grammars(chat))


def _key_of(folder: Path) -> str:
    """The content of all files that make a tokenizer and its template."""
    import hashlib

    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    digest = hashlib.sha256()
    for name in (*names, "chat_template.jinja"):
        path = folder / name
        digest.update(f"\0{name}\0".encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def _facts(source: BaseSource, base: Base) -> dict[str, Any]:
    return {"base": source.name, "revision": source.revision, "quantize": base.quantize}


def _free_bytes() -> int:
    """Bytes for keys and values of running rows."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0] * _CACHE_SHARE)
    return min(_CPU_CACHE_BYTES, int(psutil.virtual_memory().available * _CACHE_SHARE))

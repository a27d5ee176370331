"""Other engines for the same adapters: each adapter verified, judged, exported and its words compared; the command.

vLLM, SGLang and llama.cpp run in environments of their own, which none of them shares with this one; here they are
only started and asked over HTTP. What an engine refuses, or would run wrong without a word, is refused before that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lora_tune.adapter.compat import judge
from lora_tune.adapter.engine_arguments import (
    Served,
    llama_server_arguments,
    sglang_arguments,
    vllm_arguments,
    vllm_rank,
)
from lora_tune.adapter.export_job import Job, Written
from lora_tune.adapter.folder import CONFIG, TEMPLATE, WEIGHTS
from lora_tune.adapter.new_folder import new_folder
from lora_tune.adapter.verify import engine_traits, verify_folder
from lora_tune.errors import CheckFailed, Problem, UsageError
from lora_tune.model.source import BaseSource, find_base
from lora_tune.recipe import Base
from lora_tune.serving.settings import TOKEN_VARIABLE

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.data.conversation import Conversation

EngineName = Literal["vllm", "sglang", "llama.cpp"]
ServerName = Literal["vllm", "sglang", "llama-server", "llama_cpp.server"]
TESTED: dict[EngineName, str] = {
    "vllm": "untested here: the command follows vLLM 0.33's own code and was never run by this project",
    "sglang": "untested here: the command follows SGLang 0.5.23's own code and was never run by this project",
    "llama.cpp": "tested with llama-cpp-python 0.3.36: its own server, and llama-server of the same sources",
}
"""What is known of each engine, said with every command until it has passed."""
_BASE_GGUF, _PYTHON_SERVER = "base.gguf", "llama_cpp_server.json"
_CONTEXT = 4096  # tokens that llama.cpp makes room for where nothing else is asked
_LOGITS_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be served where. `program` is the engine's own Python, or its command; None: found on PATH.

    `folder` is where exports are written; an export that is there already is used again. `token` is what requests must
    carry; it reaches the engine by its environment or a file that only its owner may read.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8000
    program: Path | None = None
    token: str | None = field(default=None, repr=False)
    context: int | None = None

    @property
    def url(self) -> str:
        """Where the engine will answer."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True)
class Words:
    """What an adapter must be fed: the template of its training, conversations to compare it on, where it stops."""

    chat: ChatTemplate
    conversations: Sequence[Conversation]
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class EngineCommand:
    """An engine that is ready to be started: its words, what is set besides, and what its start must then show.

    `names` are {our name: what requests call it}, the base first where it can be asked; those in `words` are compared.
    `health` is the path that answers when it is ready.
    """

    engine: EngineName
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    url: str
    health: str
    names: Mapping[str, str]
    words: Mapping[str, Words]
    notes: tuple[str, ...]
    token: str | None = field(default=None, repr=False)

    @property
    def server(self) -> ServerName:
        """The program that answers; llama.cpp has two."""
        if self.engine != "llama.cpp":
            return self.engine
        return "llama-server" if self.health == "/health" else "llama_cpp.server"

    def text(self) -> str:
        """The command as a line for a shell, without the token."""
        secret = {name for name, value in self.environment.items() if value == self.token}
        named = [
            f'{name}="${TOKEN_VARIABLE}"' if name in secret else f"{name}={value}"
            for name, value in self.environment.items()
        ]
        return " ".join([*named, shlex.join(self.arguments)])


def plan_engine(
    engine: EngineName,
    adapters: Mapping[str, Path],
    *,
    base: Base,
    wanted: Wanted,
    trust_remote_code: str | None = None,
) -> EngineCommand:
    """Verify, judge and export the adapters for an engine, compare its words with training, and make its command.

    Raises: CheckFailed where an adapter, or two together, cannot be served there as they were trained; UsageError for
    folders that cannot be written.
    """
    if not adapters:
        raise UsageError(f"{engine} is started for adapters, got none", "give --adapter NAME=FOLDER")
    source = find_base(base, trust_remote_code=trust_remote_code)
    exported = {
        name: _export(engine, name, _job(folder, base, source), wanted.folder) for name, folder in adapters.items()
    }
    _refuse_other_words(exported, engine=engine)
    notes = {note: None for one in exported.values() for note in one.notes}
    served = Served(
        base=source.name if source.kind == "hub" else str(source.folder.resolve()),
        name=source.name,
        adapters={name: str(one.folder.resolve()) for name, one in exported.items()},
        rank=max(one.rank for one in exported.values()),
        revision=source.revision if source.kind == "hub" else None,
        tokenizer=next((str(one.folder.resolve()) for one in exported.values() if one.own_words), None),
        dtype=base.compute_dtype if base.compute_dtype != "auto" else None,
        context=wanted.context,
    )
    parts = _MAKERS[engine](_Start(served, wanted, exported, source, base))
    return EngineCommand(
        engine,
        parts.arguments,
        parts.environment,
        wanted.url,
        parts.health,
        parts.names,
        {name: one.words for name, one in exported.items()},
        (*notes, TESTED[engine]),
        wanted.token,
    )


@dataclass(frozen=True)
class _Exported:
    folder: Path
    words: Words
    rank: int
    own_words: bool
    notes: tuple[str, ...]


def _job(folder: Path, base: Base, source: BaseSource) -> Job:
    """The checked folder with its words. Raises: CheckFailed."""
    from lora_tune.adapter.at_hand import words_of

    report = verify_folder(folder, base=base, depth="quick")
    if report.errors:
        raise CheckFailed(report.errors)
    chat = words_of(folder, base=source.folder)
    return Job(folder=folder, subject=report.subject, dtype="float32", chat=chat, source=source, base=base)


def _export(engine: EngineName, name: str, job: Job, place: Path) -> _Exported:
    """Write the adapter as the engine reads it, its words compared by a renderer that stands for the engine's."""
    from lora_tune.adapter.parity import check_parity, held_out_conversations

    if engine == "vllm":
        vllm_rank(max(engine_traits(job.subject).ranks))
    if engine == "llama.cpp":
        _refuse_llama(job)
    key = hashlib.sha256((job.folder / WEIGHTS).read_bytes() + (job.folder / CONFIG).read_bytes()).hexdigest()[:12]
    output = place / engine / key / name
    written = _written("gguf" if engine == "llama.cpp" else engine, job, output)
    chat = job.known_chat()
    conversations = held_out_conversations(job.folder, chat)
    if written.render is not None:
        check_parity(chat, written.render, conversations, stop_ids=written.stop_ids, target=engine)
    words = Words(chat, conversations, tuple(int(token) for token in written.stop_ids))
    notes = tuple(str(note) for note in written.facts.get("notes", ()))
    return _Exported(output, words, int(written.facts["rank"]), bool(written.facts.get("own_words")), notes)


def _written(target: str, job: Job, output: Path) -> Written:
    """The export at its place: written, or compared once more where the same one is there already."""
    from lora_tune.adapter.export_targets import TARGETS

    if not output.exists():
        with new_folder(output) as scratch:
            return TARGETS[target](job, scratch)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as beside:
        scratch = Path(beside) / output.name
        scratch.mkdir()
        return TARGETS[target](job, scratch)


def _refuse_llama(job: Job) -> None:
    """Raises: CheckFailed for what llama.cpp refuses or runs wrong even in canonical form, over a base as trained."""
    traits = engine_traits(job.subject)
    form = replace(
        traits, ranks=(max(traits.ranks),), rslora=False, several_scales=False, own_template=False, quantized_base=False
    )
    bad = [answer for answer in judge(form, "llama.cpp").answers if answer.mark in ("refused", "wrong")]
    if bad:
        raise CheckFailed([Problem(f"llama.cpp {one.reason}", one.fix, str(job.folder)) for one in bad])


def _refuse_other_words(exported: Mapping[str, _Exported], *, engine: EngineName) -> None:
    """Raises: CheckFailed where two adapters need different words of an engine that has one template for all."""
    first, *others = exported.items()
    mine = first[1].words.chat
    for name, one in others:
        if (one.words.chat.sha256, one.words.chat.eos_id) != (mine.sha256, mine.eos_id):
            reason = f"{name} and {first[0]} were trained with different chat templates, and {engine} has one for all"
            raise CheckFailed(Problem(reason, "start one engine for each, or --engine local", str(one.folder)))


def _vllm(start: _Start) -> _Parts:
    """`vllm serve`, beside the Python that is named."""
    program = _beside(start.wanted.program, "vllm")
    key = {"VLLM_API_KEY": start.wanted.token} if start.wanted.token else {}
    words = vllm_arguments(start.served, host=start.wanted.host, port=start.wanted.port)
    return _Parts((program, "serve", *words), {**key, "VLLM_NO_USAGE_STATS": "1"}, "/health", start.names)


def _sglang(start: _Start) -> _Parts:
    """`python -m sglang.launch_server`."""
    if start.wanted.token:
        reason = "SGLang takes a token on its command line alone, where every user of the machine reads it"
        raise UsageError(reason, "serve it on 127.0.0.1 without a token, behind a proxy that asks for one")
    served = replace(start.served, name=start.served.name.replace(":", "-"))  # a colon stands before an adapter's name
    words = sglang_arguments(served, host=start.wanted.host, port=start.wanted.port)
    program = str(start.wanted.program or "python")
    names = {start.served.name: served.name} | {name: f"{served.name}:{name}" for name in served.adapters}
    return _Parts((program, "-m", "sglang.launch_server", *words), {}, "/health", names)


def _llama(start: _Start) -> _Parts:
    """`llama-server`; with a Python, the server of llama-cpp-python in it. The base is written as training held it."""
    from lora_tune.adapter.export_ollama import ADAPTER_FILE
    from lora_tune.model.export_gguf import write_gguf_base
    from lora_tune.model.source import base_fingerprint

    wanted, first = start.wanted, next(iter(start.exported.values()))
    chat = first.words.chat
    held = f"{base_fingerprint(start.source)} {start.base.quantize} {start.base.double_quant} {chat.sha256}"
    place = wanted.folder / "llama.cpp" / hashlib.sha256(held.encode()).hexdigest()[:12]
    if not place.exists():
        with new_folder(place) as scratch:
            write_gguf_base(start.source, scratch / _BASE_GGUF, chat=chat, held=start.base)
    files = {name: str((one.folder / ADAPTER_FILE).resolve()) for name, one in start.exported.items()}
    most = int(start.source.config.get("max_position_embeddings") or _CONTEXT)
    context = min(most, wanted.context or _CONTEXT)
    served = replace(
        start.served,
        base=str((place / _BASE_GGUF).resolve()),
        adapters=files,
        template=str((first.folder / TEMPLATE).resolve()),
        context=context,
    )
    if wanted.program is None or not wanted.program.name.startswith("python"):
        program = str(wanted.program or "llama-server")
        key = {"LLAMA_API_KEY": wanted.token} if wanted.token else {}
        words = llama_server_arguments(served, host=wanted.host, port=wanted.port)
        called = served.name if len(files) > 1 else next(iter(files))  # the one name that this server has
        return _Parts((program, *words), key, "/health", dict.fromkeys(files, called))
    config = _python_server(served, start)
    return _Parts(
        (str(wanted.program), "-m", "llama_cpp.server", "--config_file", str(config)), {}, "/v1/models", start.names
    )


def _python_server(served: Served, start: _Start) -> Path:
    """The settings file of llama-cpp-python's server: every model by its name, with the template of training."""
    wanted, tokens = start.wanted, next(iter(start.exported.values())).words.chat.tokenizer
    place = wanted.folder.resolve() / "llama.cpp"
    context = served.context or _CONTEXT
    rows = int(start.source.config.get("vocab_size") or len(tokens))
    common = {
        "model": served.base,
        "n_ctx": context,
        "chat_format": "chat_template.default",  # the file's own; "hf-tokenizer-config" adds an empty answer
        "logits_all": 4 * context * rows <= _LOGITS_BYTES,  # else no log-probabilities: it would hold all of them
        "verbose": False,
    }
    models: list[dict[str, Any]] = [{**common, "model_alias": served.name}]
    models += [{**common, "model_alias": name, "lora_path": path} for name, path in served.adapters.items()]
    settings: dict[str, Any] = {"host": wanted.host, "port": wanted.port, "interrupt_requests": False, "models": models}
    _write_private(place / _PYTHON_SERVER, {**settings, "api_key": wanted.token} if wanted.token else settings)
    return place / _PYTHON_SERVER


def _write_private(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file that only its owner may read. Raises: UsageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1, ensure_ascii=False)
    except OSError as error:
        raise UsageError(Problem(f"cannot be written: {error.strerror}", "name another folder", str(path))) from None


def _beside(program: Path | None, name: str) -> str:
    """A command: the one that is named, or the one beside the Python that is named."""
    if program is None:
        return name
    return str(program.parent / name) if program.name.startswith("python") else str(program)


@dataclass(frozen=True)
class _Start:
    served: Served
    wanted: Wanted
    exported: Mapping[str, _Exported]
    source: BaseSource
    base: Base

    @property
    def names(self) -> dict[str, str]:
        return {name: name for name in (self.served.name, *self.served.adapters)}


class _Parts(NamedTuple):
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    health: str
    names: Mapping[str, str]


_MAKERS: dict[EngineName, Callable[[_Start], _Parts]] = {"vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama}

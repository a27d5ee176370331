"""Export for llama.cpp and Ollama: GGUF files, and the Modelfile with the base's own chat template in Go's language."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tune.adapter.export_job import OUTPUT, Job, Written
from lora_tune.adapter.modelfile import Modelfile, read_modelfile
from lora_tune.data.conversation import Conversation
from lora_tune.errors import CheckFailed, Problem

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.model.export_gguf import GgufDtype
    from lora_tune.model.llama_tokens import LlamaTokenizer

ADAPTER_FILE, BASE_FILE, MERGED_FILE, MODELFILE = "adapter.gguf", "base.gguf", "model.gguf", "Modelfile"
_HELD = (
    "~ it was trained on a base in {}, which BASE.gguf does not hold: gguf-merged and ollama-adapter write what that is"
)


def write_gguf(job: Job, scratch: Path) -> Written:
    """The adapter as `adapter.gguf`, to be run over a GGUF of its base. Raises: CheckFailed, UsageError."""
    from lora_tune.adapter.export_gguf import write_gguf_adapter
    from lora_tune.model.gguf_tokenizer import gguf_tokenizer
    from lora_tune.model.llama_tokens import llama_tokenizer

    source, base = job.known_base()
    facts = write_gguf_adapter(job.folder, scratch / ADAPTER_FILE, source=source, dtype=job.dtype)
    chat = job.known_chat()
    tokenizer = llama_tokenizer(gguf_tokenizer(chat, rows=_rows(source.config)), chat)
    (scratch / "chat_template.jinja").write_text(chat.text, encoding="utf-8")
    held = () if base.quantize == "none" else (_HELD.format(base.quantize),)
    command = f"llama-server -m BASE.gguf --lora {OUTPUT}/{ADAPTER_FILE} --jinja"
    command += f" --chat-template-file {OUTPUT}/chat_template.jinja"
    render = jinja_words(chat, tokenizer)
    return Written({**facts, **tokenizer.facts()}, render, tokenizer.stop_ids, (*held, command))


def write_merged_gguf(job: Job, scratch: Path) -> Written:
    """Base and adapter as one `model.gguf`, in the base's own number format. Raises: CheckFailed, UsageError."""
    found, facts = _merged(job, scratch / MERGED_FILE)
    render = jinja_words(job.known_chat(), found)
    return Written(
        {**facts, **found.facts()}, render, found.stop_ids, (f"llama-server -m {OUTPUT}/{MERGED_FILE} --jinja",)
    )


def write_ollama(job: Job, scratch: Path) -> Written:
    """`model.gguf`, base and adapter in one, and its Modelfile. Raises: CheckFailed, UsageError."""
    tokenizer, facts = _merged(job, scratch / MERGED_FILE)
    return _with_modelfile(job, scratch, tokenizer, facts, files=(MERGED_FILE, ""))


def write_ollama_adapter(job: Job, scratch: Path) -> Written:
    """`base.gguf`, `adapter.gguf` and a Modelfile that puts them together. Raises: CheckFailed, UsageError."""
    from lora_tune.adapter.export_gguf import write_gguf_adapter
    from lora_tune.model.export_gguf import write_gguf_base
    from lora_tune.model.llama_tokens import llama_tokenizer

    source, base = job.known_base()
    written = write_gguf_base(source, scratch / BASE_FILE, chat=job.known_chat(), held=base)
    facts = write_gguf_adapter(job.folder, scratch / ADAPTER_FILE, source=source, dtype=job.dtype)
    tokenizer = llama_tokenizer(written.tokenizer, job.known_chat())
    return _with_modelfile(job, scratch, tokenizer, {**facts, "base": written.facts()}, files=(BASE_FILE, ADAPTER_FILE))


def ollama_words(text: str, tokenizer: LlamaTokenizer) -> Callable[[Conversation], list[int]]:
    """How Ollama renders a request by this Modelfile, and its ids; of a request with tools: CheckFailed."""
    from lora_tune.data.go_chat import ollama_text
    from lora_tune.data.go_template import GoTemplate

    file = read_modelfile(text)
    template = GoTemplate(file.template)

    def render(request: Conversation) -> list[int]:
        if request.tools or any(message.tool_calls or message.reasoning for message in request.messages):
            raise CheckFailed(Problem("tools and reasoning have no place in the Modelfile's template", "merge it"))
        turns = [(message.role, message.content) for message in request.messages]
        return tokenizer.ids(ollama_text(template, turns, system=file.system))

    return render


def jinja_words(chat: ChatTemplate, tokenizer: LlamaTokenizer) -> Callable[[Conversation], list[int]]:
    """How llama.cpp renders a request by the template in the file: jinja as transformers has it, one bos at most."""

    def render(request: Conversation) -> list[int]:
        messages = [message.as_template_input() for message in request.messages]
        text = str(
            chat.tokenizer.apply_chat_template(
                messages, tools=list(request.tools) or None, add_generation_prompt=True, tokenize=False
            )
        )
        return tokenizer.ids(text.removeprefix(tokenizer.bos))

    return render


def _with_modelfile(
    job: Job, scratch: Path, tokenizer: LlamaTokenizer, facts: dict[str, Any], *, files: tuple[str, str]
) -> Written:
    from lora_tune.data.conversation import Message
    from lora_tune.data.go_chat import go_chat

    chat = job.known_chat()

    def rendered(turns: Sequence[tuple[str, str]]) -> str:
        return chat.prompt_text([Message(role, content) for role, content in turns])  # type: ignore[arg-type]

    said = go_chat(rendered, source=chat.text, bos=tokenizer.bos)
    names = chat.tokenizer.convert_ids_to_tokens
    stops = tuple(str(names(token)) for token in chat.stop_ids)
    places = [f"./{name}" if name else "" for name in files]
    file = Modelfile(places[0], places[1], said.text, said.default_system, stops)
    (scratch / MODELFILE).write_text(file.text(), encoding="utf-8", newline="\n")
    text = (scratch / MODELFILE).read_text(encoding="utf-8")
    ids = [chat.tokenizer.convert_tokens_to_ids(stop) for stop in read_modelfile(text).stops]
    notes = [*tokenizer.notes, *said.notes]
    name = shlex.quote(job.folder.resolve().name)
    how = (*(f"~ {note}" for note in notes), f"ollama create {name} -f {OUTPUT}/{MODELFILE}", f"ollama run {name}")
    return Written(
        {**facts, **tokenizer.facts(), "notes": notes}, ollama_words(text, tokenizer), [int(one) for one in ids], how
    )


def _merged(job: Job, place: Path) -> tuple[LlamaTokenizer, dict[str, Any]]:
    """The merged model, measured as `lora-tune merge` does, beside the output for as long as its GGUF is written."""
    from lora_tune.adapter.merge_job import Method, Mixture, Precision, merge_folders, prepare_merge
    from lora_tune.model.export_gguf import write_gguf_base
    from lora_tune.model.llama_tokens import llama_tokenizer
    from lora_tune.model.source import find_base
    from lora_tune.recipe import Base

    _, base = job.known_base()
    with tempfile.TemporaryDirectory(prefix=".merged.", dir=place.parent) as beside:
        merge, _ = prepare_merge((job.folder,), base_name=base.name, data=job.data)
        folder, mixture = Path(beside), Mixture(Method.linear, (1.0,), 1.0, 0)
        measured = merge_folders(merge, folder, mixture=mixture, precision=Precision.auto, max_kl=job.max_kl)
        source = find_base(Base(name=str(folder), quantize="none"))
        dtype: GgufDtype = "stored" if job.dtype == "float32" else job.dtype
        name = job.folder.resolve().name
        written = write_gguf_base(source, place, chat=job.known_chat(), dtype=dtype, name=name)
    best = measured["candidates"][measured["chosen"]]
    facts = {**written.facts(), "chosen": measured["chosen"], "candidates": measured["candidates"]}
    facts["summary"] = (
        f"{facts['architecture']}, {facts['dtype']}, {facts['bytes']:,} bytes, merged into the {facts['chosen']} base, "
        f"{best['kl']:.2e} nats (KL) from the adapter as trained"
    )
    return llama_tokenizer(written.tokenizer, job.known_chat()), facts


def _rows(config: dict[str, Any]) -> int:
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])

"""The command lines of other engines for one base and its adapters, at the versions in `adapter/compat.py`. Cold.

Sources: vLLM 0.33 `vllm serve --help` (`--lora-modules name=path`, `--max-lora-rank`, `--max-loras`, 1 if not given),
SGLang 0.5 `srt/server_args.py` (`--lora-paths name=path`, `--max-loras-per-batch`), llama.cpp `tools/server/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_tune.adapter.compat import VLLM_RANKS
from lora_tune.errors import CheckFailed

MOST_IN_A_BATCH = 8  # adapters; each more costs memory for its rank in every layer


@dataclass(frozen=True, slots=True)
class Served:
    """What an engine is to serve. Paths are those that the engine sees.

    `base` is a hub id or a folder, `name` what requests call it; `adapters` are {name: folder}. `rank` is the largest
    of all adapters. `tokenizer` is a folder with the words of training, needed where they are not the base's own;
    `template` is a Jinja file instead, where only the template differs, and for llama.cpp, whose base is a GGUF file.
    """

    base: str
    name: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    rank: int = 16
    revision: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    dtype: str | None = None
    context: int | None = None


def vllm_arguments(served: Served, *, host: str | None = None, port: int = 8000) -> list[str]:
    """What stands behind `vllm serve`; without a host, name and address are left to who types it.

    Raises: CheckFailed where a rank is larger than vLLM takes.
    """
    words = [served.base, *_address(served, host, port)]
    words += ["--revision", served.revision] if served.revision else []
    words += ["--tokenizer", served.tokenizer] if served.tokenizer else []
    words += ["--chat-template", served.template] if served.template and not served.tokenizer else []
    words += ["--tokenizer-revision", served.revision] if served.revision and not served.tokenizer else []
    words += ["--dtype", served.dtype] if served.dtype else []
    words += ["--max-model-len", str(served.context)] if served.context else []
    if served.adapters:
        together = str(min(len(served.adapters), MOST_IN_A_BATCH))
        words += ["--enable-lora", "--max-lora-rank", str(vllm_rank(served.rank)), "--max-loras", together]
        words += ["--max-cpu-loras", str(len(served.adapters))]
        words += ["--lora-modules", *(f"{name}={path}" for name, path in served.adapters.items())]
    return words


def sglang_arguments(served: Served, *, host: str | None = None, port: int = 30000) -> list[str]:
    """What stands behind `python -m sglang.launch_server`; without a host as `vllm_arguments`."""
    words = ["--model-path", served.base, *_address(served, host, port)]
    words += ["--revision", served.revision] if served.revision else []
    words += ["--dtype", served.dtype] if served.dtype else []
    words += ["--context-length", str(served.context)] if served.context else []
    words += ["--tokenizer-path", served.tokenizer] if served.tokenizer else []
    words += ["--chat-template", served.template] if served.template and not served.tokenizer else []
    if served.adapters:
        together = str(min(len(served.adapters), MOST_IN_A_BATCH))
        words += ["--enable-lora", "--max-lora-rank", str(served.rank), "--max-loras-per-batch", together]
        words += ["--lora-paths", *(f"{name}={path}" for name, path in served.adapters.items())]
    return words


def llama_server_arguments(served: Served, *, host: str, port: int) -> list[str]:
    """What stands behind `llama-server`, whose adapters are switched on by number (`/lora-adapters`), not by name.

    `base` and the adapters are GGUF files. One adapter is switched on and gives the model its name; several are loaded
    with a scale of 0, and a request names them: `"lora": [{"id": 0, "scale": 1.0}]`.
    """
    words = ["--model", served.base, "--host", host, "--port", str(port), "--jinja", "--no-webui"]
    words += ["--chat-template-file", served.template] if served.template else []
    words += ["--ctx-size", str(served.context)] if served.context else []
    alone = next(iter(served.adapters)) if len(served.adapters) == 1 else None
    words += ["--alias", alone or served.name]
    for path in served.adapters.values():
        words += ["--lora", path]
    return words if alone or not served.adapters else [*words, "--lora-init-without-apply"]


def _address(served: Served, host: str | None, port: int) -> list[str]:
    return [] if host is None else ["--served-model-name", served.name, "--host", host, "--port", str(port)]


def vllm_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that admits a rank. Raises: CheckFailed."""
    found = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if found is None:
        raise CheckFailed(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, got {rank}", "merge it: lora-tune merge")
    return found

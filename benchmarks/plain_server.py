"""What one writes first: a server that calls `generate` of transformers for each request, one after the other.

`python -m benchmarks.plain_server BASE NAME=FOLDER …` prints its address. For comparison with `lora-tune serve` only.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request

from lora_tune.adapter.load import attach_saved, read_adapter
from lora_tune.model.base import load_base
from lora_tune.model.source import find_base, load_tokenizer
from lora_tune.recipe import Base


def build(base: str, adapters: dict[str, Path]) -> FastAPI:
    """The application: one lock around `set_adapter` and `generate`."""
    section = Base.model_validate({"name": base, "quantize": "none"})
    source = find_base(section)
    tokenizer, model = load_tokenizer(source), load_base(source, section)
    wrapped: Any = model
    for name, folder in adapters.items():
        wrapped = attach_saved(wrapped, read_adapter(folder), name=name)
    app, lock = FastAPI(), asyncio.Lock()

    def answer(name: str, prompt: str, most: int) -> tuple[str, int]:
        wrapped.set_adapter(name)
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        with torch.inference_mode():
            new = wrapped.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False
            )[0, ids.shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True)), len(new)

    @app.post("/v1/completions")
    async def completions(request: Request) -> dict[str, Any]:
        asked = await request.json()
        async with lock:
            text, count = await asyncio.to_thread(answer, asked["model"], asked["prompt"], asked["max_tokens"])
        return {"choices": [{"index": 0, "text": text}], "usage": {"completion_tokens": count}}

    return app


def main() -> None:
    """Serve on a free port."""
    adapters = {name: Path(folder) for name, _, folder in (word.partition("=") for word in sys.argv[2:])}
    app = build(sys.argv[1], adapters)
    listening = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    asyncio.run(uvicorn.Server(uvicorn.Config(app, log_level="warning")).serve(sockets=[listening]))


if __name__ == "__main__":
    main()

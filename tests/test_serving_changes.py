"""The embedded engine while things change: adapters come and go, clients leave, requests fail, the server stops."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import finished
import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_kit import ask, ask_all, base_section, prompt, write_adapter

from lora_tune.errors import CheckFailed, UsageError
from lora_tune.serving.backend import (
    Draining,
    EngineFailed,
    QueueFull,
    Request,
    Sampling,
    TooLong,
    UnknownModel,
)
from lora_tune.serving.engine import Limits
from lora_tune.serving.local import LocalBackend
from lora_tune.serving.runner import Runner

GREEDY = Sampling(8)
LONG = Sampling(300)


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    found = {name: write_adapter(place / name, tiny_base, seed=seed) for seed, name in enumerate(("a", "b", "c"))}
    finished.write_finished(place / "own", tiny_base, lora={"modules_to_save": ["lm_head"]})
    return {**found, "own": place / "own"}


Serve = Callable[..., LocalBackend]


@pytest.fixture
def serve(tiny_base: Path, folders: dict[str, Path]) -> Iterator[Serve]:
    started: list[LocalBackend] = []

    def start(*names: str, **limits: Any) -> LocalBackend:
        chosen = {name: folders[name] for name in names}
        started.append(LocalBackend.start(base_section(tiny_base), adapters=chosen, limits=Limits(**limits)))
        return started[-1]

    yield start
    for backend in started:
        asyncio.run(backend.close(grace_s=0))
    assert not [thread for thread in threading.enumerate() if thread.name == "lora_tune-engine"]


def hashes(backend: LocalBackend) -> dict[str, int]:
    """Every number of the base and of the adapters on it, by its name."""

    def read(runner: Runner) -> dict[str, int]:
        held = {**dict(runner.base.named_parameters()), **dict(runner.base.named_buffers())}
        own = {name: tensor for name, tensor in held.items() if "all-together" not in name}
        return {name: hash(tensor.detach().float().numpy().tobytes()) for name, tensor in own.items()}

    found: dict[str, int] = backend._engine.call(read).result()
    return found


def test_loading_and_unloading_changes_nobody_else(serve: Serve, folders: dict[str, Path], tmp_path: Path) -> None:
    backend = serve("a", "own")
    base = backend.models()[0].name
    asked = [(name, prompt(number), GREEDY) for number, name in enumerate((base, "a", "own", "a"))]
    before, answers = hashes(backend), [said.ids for said in asyncio.run(ask_all(backend, asked))]
    broken = tmp_path / "broken"
    shutil.copytree(folders["b"], broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.zeros(260, 64)  # would overwrite the base
    save_file(tensors, broken / "adapter_model.safetensors")

    async def change() -> None:
        for round_ in range(6):
            await backend.load("b", folders["b"])
            assert {model.name for model in backend.models()} == {base, "a", "b", "own"}
            await ask(backend, "b", prompt(1), GREEDY)
            with pytest.raises(CheckFailed):
                await backend.load("x", broken)
            if round_ % 2:
                await backend.load("other", folders["own"])
                await backend.unload("other")
            await backend.unload("b")
            with pytest.raises(UnknownModel):
                await ask(backend, "b", prompt(1), GREEDY)

    async def busy() -> list[Any]:
        found: list[Any] = []
        changing = asyncio.create_task(change())
        while not changing.done():
            found.append([said.ids for said in await ask_all(backend, asked)])
        await changing
        return found

    found = asyncio.run(busy())
    assert len(found) > 3 and all(one == answers for one in found)
    assert hashes(backend) == before


def test_an_adapter_that_is_unloaded_finishes_what_runs(serve: Serve) -> None:
    backend = serve("a", "b", rows=1)

    async def go() -> None:
        running = asyncio.create_task(ask(backend, "a", prompt(1), Sampling(40)))
        waiting = asyncio.create_task(ask(backend, "a", prompt(2), GREEDY))
        other = asyncio.create_task(ask(backend, "b", prompt(3), GREEDY))
        while not backend.statistics().running:
            await asyncio.sleep(0.001)
        await backend.unload("a")
        assert (await running).end.reason in ("length", "stop")
        with pytest.raises(UnknownModel):
            await waiting
        assert (await other).end.completion_tokens
        with pytest.raises(UnknownModel):
            backend.chat("a")

    asyncio.run(go())


def test_names_and_requests_are_checked(serve: Serve, folders: dict[str, Path], tmp_path: Path) -> None:
    backend = serve("a")
    base = backend.models()[0].name

    async def refused(kind: type[Exception], what: Awaitable[Any]) -> None:
        with pytest.raises(kind) as caught:
            await what
        assert str(tmp_path.parent.parent) not in str(caught.value) or kind is CheckFailed

    async def go() -> None:
        for name in ("", "A", "../b", "a.b", "-b", "x" * 65, "a", base):
            await refused(UsageError, backend.load(name, folders["b"]))
        await refused(UsageError, backend.unload(base))
        await refused(UnknownModel, backend.unload("nobody"))
        await refused(UnknownModel, ask(backend, "nobody", prompt(1), GREEDY))
        await refused(TooLong, ask(backend, "a", [5] * 500, Sampling(13)))
        await refused(UsageError, ask(backend, "a", [5, 260], GREEDY))
        await refused(UsageError, ask(backend, "a", [-1], GREEDY))
        await refused(UsageError, ask(backend, "a", [], GREEDY))
        assert (await ask(backend, "a", [5] * 500, Sampling(12))).end.prompt_tokens == 500

    asyncio.run(go())


def test_a_client_that_leaves_is_answered_no_more(serve: Serve) -> None:
    backend = serve("a", "own", rows=2)

    async def leaving(model: str) -> None:
        async with aclosing(backend.stream(Request(model, tuple(prompt(1)), LONG))) as items:
            async for _ in items:
                break

    async def go() -> None:
        await asyncio.gather(leaving("a"), leaving("own"))
        waiting = [asyncio.create_task(ask(backend, "a", prompt(number), LONG)) for number in range(4)]
        while not backend.statistics().waiting:
            await asyncio.sleep(0.001)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        while backend.statistics().running or backend.statistics().waiting:
            await asyncio.sleep(0.001)
        assert (await ask(backend, "a", prompt(1), GREEDY)).ids
        assert not backend._engine._batches and sum(one.cancelled for one in counted().values()) == 6

    def counted() -> Any:
        return backend.statistics().models

    asyncio.run(go())


def test_whoever_asked_to_load_or_unload_may_leave(serve: Serve, folders: dict[str, Path]) -> None:
    backend = serve("a")

    async def left(what: Awaitable[None]) -> None:
        task = asyncio.ensure_future(what)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def go() -> None:
        running = asyncio.create_task(ask(backend, "a", prompt(1), Sampling(100)))
        while not backend.statistics().running:
            await asyncio.sleep(0.001)
        await left(backend.load("b", folders["b"]))
        while "b" not in {model.name for model in backend.models()}:
            await asyncio.sleep(0.01)
        await left(backend.unload("a"))
        assert (await running).end.completion_tokens
        assert (await ask(backend, "b", prompt(1), GREEDY)).ids
        assert len(backend._engine.call(lambda runner: sorted(runner._mixable)).result()) == 1

    asyncio.run(go())


def test_an_adapter_may_go_while_a_request_to_it_is_prepared(serve: Serve) -> None:
    """The grammar of a JSON object is made in another thread; who asked for it is told what became of the model."""
    pytest.importorskip("llguidance")
    backend = serve("a", "b")

    async def go() -> None:
        asked = asyncio.create_task(ask(backend, "a", prompt(1), Sampling(8, response="json_object")))
        await asyncio.sleep(0)
        await backend.unload("a")
        with pytest.raises(UnknownModel):
            await asked

    asyncio.run(go())
    assert not any(one.failed for one in backend.statistics().models.values())


def test_words_go_with_the_last_adapter_that_has_them(serve: Serve, tiny_base: Path, tmp_path: Path) -> None:
    finished.write_finished(tmp_path / "words", tiny_base, lora={"new_tokens": ["<a>"]})
    backend = serve("a")

    async def go() -> None:
        for _ in range(2):
            await backend.load("words", tmp_path / "words")
            assert len(backend._words) == 2 and (await ask(backend, "words", [260, 5], GREEDY)).ids
            await backend.unload("words")
            gc.collect()
            assert len(backend._words) == 1

    asyncio.run(go())


def test_a_full_queue_refuses_and_nothing_is_lost(serve: Serve) -> None:
    backend = serve("a", rows=2, queue=3)

    async def go() -> list[Any]:
        tasks = [asyncio.create_task(ask(backend, "a", prompt(number), GREEDY)) for number in range(20)]
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    found = asyncio.run(go())
    refused = [one for one in found if isinstance(one, QueueFull)]
    assert len(refused) == 15 and all(one.end.reason for one in found if one not in refused)


def test_closing_finishes_what_runs_and_refuses_what_waits(serve: Serve) -> None:
    backend = serve("a", rows=1)

    async def go() -> None:
        running = asyncio.create_task(ask(backend, "a", prompt(1), Sampling(60)))
        waiting = asyncio.create_task(ask(backend, "a", prompt(2), GREEDY))
        while not backend.statistics().running:
            await asyncio.sleep(0.001)
        await backend.close(grace_s=30)
        assert (await running).end.reason in ("length", "stop")
        for refused in (waiting, ask(backend, "a", prompt(3), GREEDY)):
            with pytest.raises(Draining):
                await refused

    asyncio.run(go())


def test_closing_without_grace_cancels(serve: Serve) -> None:
    backend = serve("a", rows=4)

    async def go() -> None:
        running = [asyncio.create_task(ask(backend, "a", prompt(number), LONG)) for number in range(4)]
        while backend.statistics().running < 4:
            await asyncio.sleep(0.001)
        await backend.close(grace_s=0)
        assert {said.end.reason for said in await asyncio.gather(*running)} <= {"cancelled", "stop", "length"}

    asyncio.run(go())


@pytest.mark.parametrize("at", ["the model", "the text"])
def test_a_request_that_fails_takes_nobody_with_it(at: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt holds a token at which the model, or the making of its text, raises."""
    backend = serve("a", "b", "own")
    asked = [(name, prompt(number), Sampling(12)) for number, name in enumerate(("a", "b", "own", "a"))]
    expected = [said.ids for said in asyncio.run(ask_all(backend, asked))]
    poison = [7] * 31

    if at == "the model":
        forward = Runner.forward

        def failing(self: Runner, ids_BT: torch.Tensor, *args: Any, keep: Any = None) -> torch.Tensor:
            if any(row.tolist()[:31] == poison for row in ids_BT):
                raise torch.OutOfMemoryError("no room for this one")
            return forward(self, ids_BT, *args, keep=keep)

        monkeypatch.setattr(Runner, "forward", failing)
    else:
        from lora_tune.serving.job import Row

        take = Row.take

        def broken(self: Row, token: int, logprobs: Any) -> Any:
            if self.ids[:31] == poison:
                raise RuntimeError("this one is odd")
            return take(self, token, logprobs)

        monkeypatch.setattr(Row, "take", broken)

    async def go() -> None:
        found = await asyncio.gather(*(ask(backend, *one) for one in asked), ask(backend, "a", poison, GREEDY),
                                     return_exceptions=True)  # fmt: skip
        assert isinstance(found[-1], EngineFailed) and "odd" not in str(found[-1])
        assert [one.ids for one in found[:-1] if not isinstance(one, BaseException)] == expected

    asyncio.run(go())
    counted = backend.statistics().models
    assert sum(one.failed for one in counted.values()) == 1
    assert [said.ids for said in asyncio.run(ask_all(backend, asked))] == expected

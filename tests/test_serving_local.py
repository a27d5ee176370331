"""The embedded engine: whoever asks beside whom, every answer is the one that its adapter gives alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import finished
import pytest
import torch
from serving_kit import ask, ask_all, base_section, prompt, write_adapter

from lora_tune.adapter.load import load_adapter
from lora_tune.errors import UsageError
from lora_tune.model.base import load_base
from lora_tune.model.generation import generate, transformer
from lora_tune.model.source import find_base
from lora_tune.serving.backend import (
    Piece,
    Request,
    Sampling,
)
from lora_tune.serving.engine import Limits
from lora_tune.serving.local import LocalBackend

GREEDY = Sampling(10)
OWN: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora"},
    "head": {"modules_to_save": ["lm_head"]},
}  # adapters that share no batch with others


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight adapters that can be mixed, of different ranks, scales and targets, and two that cannot."""
    place = tmp_path_factory.mktemp("adapters")
    found = {}
    for number in range(8):
        targets = ("q_proj", "v_proj") if number % 3 == 2 else ("q_proj", "o_proj", "gate_proj", "down_proj")
        extra: dict[str, Any] = {"use_rslora": True} if number == 4 else {"rank_pattern": {}}
        folder = place / f"a{number}"
        found[folder.name] = write_adapter(folder, tiny_base, seed=number, rank=2 + number, targets=targets, **extra)
    for name, lora in OWN.items():
        finished.write_finished(place / name, tiny_base, lora=lora)
        found[name] = place / name
    return found


@pytest.fixture(scope="module")
def backend(tiny_base: Path, folders: dict[str, Path]) -> Iterator[LocalBackend]:
    served = LocalBackend.start(base_section(tiny_base), adapters=folders, limits=Limits(rows=24, prefill_tokens=64))
    yield served
    asyncio.run(served.close(grace_s=5))


def alone(base: Path, folder: Path | None, asked: list[list[int]], backend: LocalBackend, model: str) -> Any:
    """What `generate` answers with this adapter on a base of its own, by PEFT's own layers."""
    section = base_section(base)
    loaded: Any = load_base(find_base(section), section)
    if folder is not None:
        loaded = load_adapter(loaded, folder)
    found = generate(loaded, backend.chat(model), asked, max_new_tokens=GREEDY.max_new_tokens, batch_size=1)
    return [answer.ids for answer in found]


def test_32_clients_of_8_adapters_get_the_answers_of_each_adapter_alone(
    backend: LocalBackend, folders: dict[str, Path], tiny_base: Path
) -> None:
    names = [backend.models()[0].name, *(f"a{number}" for number in range(8)), *OWN]
    asked = {name: [prompt(31 * place + row) for row in range(4)] for place, name in enumerate(names)}
    expected = {name: alone(tiny_base, folders.get(name), asked[name], backend, name) for name in names}
    assert len({ids for answers in expected.values() for ids in answers}) > 40, "answers must tell adapters apart"

    async def clients() -> dict[str, list[Any]]:
        async def client(name: str) -> list[Any]:
            return [(await ask(backend, name, one, GREEDY)).ids for one in asked[name]]

        async def many(name: str) -> list[Any]:  # four clients for each model, each with a question of its own
            return [said.ids for said in await ask_all(backend, [(name, one, GREEDY) for one in asked[name]])]

        serial, together = asyncio.gather(*map(client, names)), asyncio.gather(*map(many, names))
        first, second = await serial, await together
        assert first == second
        return dict(zip(names, second, strict=True))

    assert asyncio.run(clients()) == expected
    counted = backend.statistics()
    assert counted.running == counted.waiting == 0
    assert counted.step_rows / counted.steps > 2, "requests must have shared batches"


def test_new_tokens_are_those_of_their_adapter_alone(tiny_base: Path, tmp_path: Path) -> None:
    finished.write_finished(tmp_path / "tokens", tiny_base, lora={"new_tokens": ["<a>", "<b>"]})
    write_adapter(tmp_path / "plain", tiny_base, seed=1)
    folders = {name: tmp_path / name for name in ("plain", "tokens")}
    served = LocalBackend.start(base_section(tiny_base), adapters=folders)
    names = [model.name for model in served.models()]
    asked = {name: [prompt(number) for number in range(3)] for name in names}
    asked["tokens"].append([*prompt(4), 260, 261])

    async def go() -> dict[str, list[Any]]:
        flat = [(name, one, GREEDY) for name in names for one in asked[name]]
        said = iter(await ask_all(served, flat))
        with pytest.raises(UsageError, match="tokens from 0 to 259"):
            await ask(served, "plain", [260], GREEDY)
        await served.close(grace_s=1)
        return {name: [next(said).ids for _ in asked[name]] for name in names}

    expected = {name: alone(tiny_base, folders.get(name), asked[name], served, name) for name in names}
    assert asyncio.run(go()) == expected


def test_what_is_drawn_depends_on_the_seed_alone(backend: LocalBackend) -> None:
    names = [model.name for model in backend.models()]
    drawn = [
        (names[number % len(names)], prompt(number), Sampling(12, temperature=0.8, top_p=0.9, top_k=40, seed=number))
        for number in range(24)
    ]

    async def both() -> tuple[list[Any], list[Any]]:
        together = await ask_all(backend, [*drawn, *[(names[0], prompt(5), GREEDY)] * 3])
        return [said.ids for said in together[:24]], [(await ask(backend, *one)).ids for one in drawn]

    together, one_by_one = asyncio.run(both())
    assert together == one_by_one
    cold, greedy = asyncio.run(
        ask_all(backend, [("a0", prompt(8), Sampling(10, temperature=1e-300)), ("a0", prompt(8), GREEDY)])
    )
    assert cold.ids == greedy.ids
    varied = [(names[0], prompt(3), Sampling(12, temperature=1.0, seed=seed)) for seed in range(6)]
    assert len({said.ids for said in asyncio.run(ask_all(backend, varied))}) == 6


def log_probs_of(model: Any, ids: tuple[int, ...], prompt_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = transformer(model)(input_ids=torch.tensor([[*prompt_ids, *ids]])).logits[0]
    return logits[len(prompt_ids) - 1 : -1].float().log_softmax(dim=-1)


@pytest.mark.parametrize(("quantize", "tolerance"), [("none", 1e-4), ("nf4", 2e-3)])
def test_log_probabilities_are_those_of_the_adapter_alone(
    quantize: str, tolerance: float, folders: dict[str, Path], tiny_base: Path
) -> None:
    section = base_section(tiny_base, quantize=quantize)
    names = ["a0", "a3", "a4", "dora"]
    served = LocalBackend.start(section, adapters={name: folders[name] for name in names})
    sampling = Sampling(8, logprobs=3, temperature=0.5, seed=1)

    async def go() -> list[Any]:
        found = await ask_all(served, [(name, prompt(place), sampling) for place, name in enumerate(names)])
        await served.close(grace_s=1)
        return found

    for place, (name, said) in enumerate(zip(names, asyncio.run(go()), strict=True)):
        model = load_adapter(load_base(find_base(section), section), folders[name])
        expected = log_probs_of(model, said.ids, prompt(place))
        assert len(said.logprobs) == len(said.ids)
        for step, one in enumerate(said.logprobs):
            assert one.id == said.ids[step] and abs(one.logprob - float(expected[step, one.id])) <= tolerance
            best = expected[step].topk(3)
            assert [round(other.logprob, 2) for other in one.top] == pytest.approx(
                [round(value, 2) for value in best.values.tolist()], abs=0.011
            )


def test_answers_end_at_stop_strings_stop_tokens_and_the_limit(backend: LocalBackend) -> None:
    name = "a1"
    said = asyncio.run(ask(backend, name, prompt(2), Sampling(24, temperature=1.0, seed=4)))
    assert said.end.reason in ("length", "stop") and said.end.prompt_tokens == len(prompt(2))
    assert said.end.completion_tokens == len(said.ids) + (said.end.reason == "stop")
    middle = len(said.text) // 2
    stop = said.text[middle : middle + 2]
    cut = asyncio.run(ask(backend, name, prompt(2), Sampling(24, temperature=1.0, seed=4, stop=(stop,))))
    assert cut.text == said.text[: said.text.index(stop)] and cut.end.reason == "stop"
    assert cut.ids == said.ids[: len(cut.ids)]


def test_json_object_gives_json(backend: LocalBackend) -> None:
    pytest.importorskip("llguidance")
    sampling = [Sampling(60, temperature=1.5, seed=seed, response="json_object") for seed in range(16)]
    plain = [("a2", prompt(9), GREEDY)] * 2
    found = asyncio.run(ask_all(backend, [*(("a2", prompt(seed), one) for seed, one in enumerate(sampling)), *plain]))
    whole = [said for said in found[:16] if said.end.reason == "stop"]
    assert whole and all(isinstance(json.loads(said.text), dict) for said in whole)
    assert all(said.text.lstrip().startswith("{") for said in found[:16] if said.text.strip())
    assert found[16].ids == found[17].ids == asyncio.run(ask(backend, *plain[0])).ids


def test_a_long_prompt_does_not_hold_up_running_answers(backend: LocalBackend) -> None:
    """The prompt is read in pieces of 64 tokens; between two of them every running answer gets a token."""
    name, calm = backend.models()[0].name, calm_prompt(backend)
    seen: list[str] = []

    async def stream(label: str, asked: list[int], count: int) -> None:
        async with aclosing(backend.stream(Request(name, tuple(asked), Sampling(count)))) as items:
            async for item in items:
                seen.append(label if isinstance(item, Piece) else f"{label} ended")

    async def go() -> None:
        running = asyncio.create_task(stream("short", calm, 200))
        while not seen:
            await asyncio.sleep(0)
        began = len(seen)
        await stream("long", [5 + place % 200 for place in range(400)], 2)
        first = seen.index("long")
        assert seen[began:first].count("short") >= 400 // 64 - 1
        await running

    asyncio.run(go())


def calm_prompt(backend: LocalBackend) -> list[int]:
    """A prompt whose answer by the base is long."""
    name = backend.models()[0].name
    for number in range(50):
        if asyncio.run(ask(backend, name, prompt(number), Sampling(200))).end.reason == "length":
            return prompt(number)
    raise AssertionError("all answers end early")

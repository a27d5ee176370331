"""Greedy answers: in batches as one by one, and without a trace in the model or in the random state."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lora_tune.data.chat_template import ChatTemplate, load_chat_template
from lora_tune.model import generation
from lora_tune.model.generation import Answer, evaluating, generate
from lora_tune.model.source import find_base
from lora_tune.recipe import Base, Lora


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> ChatTemplate:
    return load_chat_template(AutoTokenizer.from_pretrained(tiny_base))


@pytest.fixture
def model(tiny_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


def prompts(count: int, *, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(4, 260) for _ in range(generator.randint(1, 60))] for _ in range(count)]


def with_early_ends(model: PreTrainedModel, chat: ChatTemplate) -> PreTrainedModel:
    """Make the stop token likely enough that some rows end early."""
    with torch.no_grad():
        model.get_output_embeddings().weight[min(chat.stop_ids)] *= 2.5
    return model


def with_adapter(base: Base, folder: Path) -> torch.nn.Module:
    """A base with an adapter that changes its answers."""
    from lora_tune.model.base import load_base
    from lora_tune.model.methods import attach

    source = find_base(base)
    peft_model = attach(load_base(source, base), Lora(rank=4), source=source, base=base, seed=1)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return peft_model


def manual(model: PreTrainedModel, chat: ChatTemplate, prompt: list[int], most: int) -> Answer:
    """Greedy search without cache, batch, padding or `generate`."""
    ids = list(prompt)
    model.eval()
    with torch.no_grad():
        while len(ids) < len(prompt) + most:
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in chat.stop_ids:
                break
            ids.append(token)
    new = tuple(ids[len(prompt) :])
    return Answer(chat.decode_answer(new), new, stopped=len(new) < most)


def test_batches_answer_as_a_plain_loop_does(model: PreTrainedModel, chat: ChatTemplate) -> None:
    model = with_early_ends(model, chat)
    asked = prompts(12)
    expected = [manual(model, chat, prompt, 16) for prompt in asked]
    assert 1 < sum(answer.stopped for answer in expected) < 12, "some rows must end early and some not"
    for batch_size in (1, 5, 64):
        assert generate(model, chat, asked, max_new_tokens=16, batch_size=batch_size) == expected


def test_the_order_of_the_prompts_changes_no_answer(model: PreTrainedModel, chat: ChatTemplate) -> None:
    asked = prompts(10)
    forward = generate(model, chat, asked, max_new_tokens=8)
    assert generate(model, chat, asked[::-1], max_new_tokens=8) == forward[::-1]


def test_settings_of_the_base_for_sampling_are_not_used_and_stay(model: PreTrainedModel, chat: ChatTemplate) -> None:
    asked = prompts(4)
    plain = generate(model, chat, asked, max_new_tokens=12)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.suppress_tokens = True, 5.0, 3.0, [plain[0].ids[0]]
    own.max_length = 3
    assert generate(model, chat, asked, max_new_tokens=12) == plain
    assert model.generation_config is own and own.repetition_penalty == 3.0


@pytest.mark.parametrize("setting", ["training", "evaluating", "mixed", "checkpointed"])
def test_modes_settings_and_random_states_stay(model: PreTrainedModel, chat: ChatTemplate, setting: str) -> None:
    model.train(setting != "evaluating")
    if setting == "mixed":
        model.model.layers[0].eval()
    if setting == "checkpointed":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    before = [module.training for module in model.modules()]
    states = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    calls: list[int] = []
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    answers = generate(model, chat, prompts(5), max_new_tokens=6)
    handle.remove()
    assert len(answers) == 5
    assert calls[1:] == [1] * (len(calls) - 1), "after the prompt one token at a time: the cache works"
    assert [module.training for module in model.modules()] == before
    assert all(layer.gradient_checkpointing == (setting == "checkpointed") for layer in model.model.layers)
    assert model.config.use_cache is False
    assert torch.equal(states[0], torch.get_rng_state()) and states[1:] == (
        random.getstate(),
        str(np.random.get_state()),
    )


def test_modes_come_back_after_an_error(model: PreTrainedModel) -> None:
    model.train()
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_adapters_on_and_off_answer_as_themselves(tiny_base: Path, chat: ChatTemplate, quantize: str) -> None:
    base = Base(name=str(tiny_base), quantize=quantize, compute_dtype="float32")
    peft_model = with_adapter(base, tiny_base)
    asked = prompts(6)
    on = generate(peft_model, chat, asked, max_new_tokens=8)
    with peft_model.disable_adapter():
        off = generate(peft_model, chat, asked, max_new_tokens=8)
    assert on != off
    assert generate(peft_model, chat, asked, max_new_tokens=8, batch_size=1) == on
    from lora_tune.model.base import load_base

    alone = load_base(find_base(base), base)
    assert generate(alone, chat, asked, max_new_tokens=8) == off


def test_batches_stay_within_the_cache_and_progress_counts_rows(
    model: PreTrainedModel, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(20)
    unbounded = generate(model, chat, asked, max_new_tokens=4)
    seen: list[tuple[int, int]] = []
    forward: Callable = model.forward

    def watched(*args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    per_token = 2 * 2 * 32 * 4  # keys and values, two layers, two heads of 16, float32
    monkeypatch.setattr(generation, "CACHE_BYTES", 150 * per_token)
    counts: list[int] = []
    assert generate(model, chat, asked, max_new_tokens=4, progress=counts.append) == unbounded
    assert sum(counts) == 20 and len(counts) > 5
    assert all(rows * (length + 4) <= 150 for rows, length in seen if length > 1)


def test_an_empty_prompt_is_refused_and_no_prompts_give_no_answers(model: PreTrainedModel, chat: ChatTemplate) -> None:
    with pytest.raises(ValueError, match="without tokens"):
        generate(model, chat, [[5], []], max_new_tokens=2)
    assert generate(model, chat, [], max_new_tokens=2) == []

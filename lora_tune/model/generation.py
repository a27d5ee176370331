"""Answers in batches: what evaluation, samples and verification let a model say."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from lora_tune.errors import UsageError
from lora_tune.model.decoding import Decoding, Held, decode, has_plain_cache
from lora_tune.model.pieces import CACHE_BYTES
from lora_tune.model.shape import read_shape

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_tune.data.chat_template import ChatTemplate

_BATCH_TOKENS = 16_384  # padded prompt and answer tokens of one batch, at most


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered: the text, its token ids without the stop token, and whether a stop token ended it."""

    text: str
    ids: tuple[int, ...]
    stopped: bool


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and every module of it back into the mode it was in.

    Gradient checkpointing acts in training mode only, so that it stays set and a KV cache works meanwhile.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def generate(
    model: PreTrainedModel | PeftModel,
    chat: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer prompts (token ids that end with the generation prompt) greedily; answers come in the order of the
    prompts.

    Prompts of similar length share a batch, are padded on the left and end each by itself. Decoding is plain greedy
    search: penalties and sampling of the base's `generation_config` are not used, so that base and adapter are asked in
    the same way. Draws no random number; `progress(n)` is called after every batch with the number of its prompts.

    Raises ValueError for an empty prompt.
    """
    decoding = Decoding(max_new_tokens, batch_size)
    answers: dict[int, Answer] = {}
    for found in answer_batches(model, chat, prompts, decoding=decoding):
        answers |= found
        if progress:
            progress(len(found))
    return [answers[row] for row in range(len(prompts))]


def answer_batches(
    model: PreTrainedModel | PeftModel,
    chat: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    done: Container[int] = (),
) -> Iterator[dict[int, Answer]]:
    """Answers by number of the prompt, batch after batch, the longest prompts first.

    Which prompts share a batch depends on their lengths and on `decoding` alone. A batch whose prompts are all in
    `done` is passed over; any other one is answered whole, so that an answer is the same whatever was done before.

    Raises ValueError for an empty prompt.
    """
    if any(not len(prompt) for prompt in prompts):
        raise ValueError("a prompt without tokens cannot be answered")
    base = transformer(model)
    lengths = [len(prompt) + decoding.max_new_tokens for prompt in prompts]
    for batch in _batches(lengths, decoding.batch_size, most_tokens=_most_tokens(base)):
        if all(row in done for row in batch):
            continue
        answers: dict[int, Answer] = {}

        def answer(rows: list[int], answers: dict[int, Answer] = answers) -> None:
            asked = [prompts[row] for row in rows]
            new_ids = _fitting(partial(_new_ids, base, chat, asked, rows=rows, decoding=decoding), base, len(rows))
            answers.update({row: _answer(chat, new_T) for row, new_T in zip(rows, new_ids, strict=True)})

        with evaluating(model):
            in_halves(batch, answer)
        yield answers


def _fitting(answer: Callable[..., list[list[int]]], base: PreTrainedModel, rows: int) -> list[list[int]]:
    """New token ids; of one row whose keys and values are too much for the device, with them in the machine's memory.

    Raises torch.OutOfMemoryError where that is not enough, or there are several rows.
    """
    try:
        return answer(held="device")
    except torch.OutOfMemoryError:
        if rows > 1 or not has_plain_cache(base):
            raise
    torch.cuda.empty_cache()  # behind the handler, which holds the tensors of the failed attempt
    return answer(held="host")


def _new_ids(
    base: PreTrainedModel,
    chat: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    *,
    rows: Sequence[int],
    decoding: Decoding,
    held: Held,
) -> list[list[int]]:
    """New token ids of the prompts of one batch, by our own loop or, for other architectures, by transformers'."""
    ids_BT, mask_BT = _left_padded(prompts, chat.pad_id, device=base.device)
    if has_plain_cache(base):
        stops = sorted(chat.stop_ids)
        return decode(base, ids_BT, mask_BT, rows=rows, stop_ids=stops, decoding=decoding, held=held)
    if decoding.temperature:
        raise UsageError(
            f"{type(base).__name__} answers by greedy search only, got temperature {decoding.temperature}",
            "set the temperature to 0",
        )
    with _only_greedy(base, chat, decoding.max_new_tokens):
        output_BT = cast(Any, base).generate(input_ids=ids_BT, attention_mask=mask_BT)
    return cast(list[list[int]], output_BT[:, ids_BT.shape[1] :].tolist())


def in_halves(batch: list[int], work: Callable[[list[int]], None]) -> None:
    """Do the work on these rows, and where memory does not suffice for all of them at once, on each half of them.

    Raises torch.OutOfMemoryError where one row alone is too large.
    """
    try:
        work(batch)
        return
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()  # behind the handler, which holds the tensors of the failed attempt
    in_halves(batch[: len(batch) // 2], work)
    in_halves(batch[len(batch) // 2 :], work)


def transformer(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model of transformers itself, with adapters in its layers where it has some."""
    return model if isinstance(model, PreTrainedModel) else cast(PreTrainedModel, model.get_base_model())


@contextmanager
def _only_greedy(base: PreTrainedModel, chat: ChatTemplate, max_new_tokens: int) -> Iterator[None]:
    """Replace the base's `generation_config` meanwhile: what a call leaves open, transformers takes from there."""
    own = base.generation_config
    base.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(chat.stop_ids),
        pad_token_id=chat.pad_id,
    )
    try:
        yield
    finally:
        base.generation_config = own


def _most_tokens(base: PreTrainedModel) -> int:
    """Tokens whose keys and values fit into the cache that a batch may have."""
    shape = read_shape(base.config.to_dict())
    per_token = 2 * shape.layers * shape.key_value * base.dtype.itemsize
    return max(1, min(_BATCH_TOKENS, CACHE_BYTES // per_token))


def _batches(lengths: Sequence[int], batch_size: int, *, most_tokens: int) -> Iterator[list[int]]:
    """Row numbers, longest rows first, in batches of at most `batch_size` rows and `most_tokens` padded tokens."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[batch[0]] > most_tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, *, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (B, T), padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def _answer(chat: ChatTemplate, new_ids: list[int]) -> Answer:
    """Cut a row of generated ids at its first stop token."""
    end = next((place for place, token in enumerate(new_ids) if token in chat.stop_ids), None)
    ids = tuple(new_ids if end is None else new_ids[:end])
    return Answer(text=chat.decode_answer(ids), ids=ids, stopped=end is not None)

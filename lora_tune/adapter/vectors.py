"""Test vectors: what base and adapter answered where they were trained, replayed wherever they are loaded.

For a few fixed prompts `test_vectors.json` keeps the token ids, a short continuation and, at the last positions, the
most likely tokens with their log-probabilities, with and without the adapter. Replaying them shows that base, chat
template and adapter really loaded, and at which scale; a loader that silently leaves the adapter out (PEFT does, where
no tensor name fits) gives the base's numbers and is caught.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_tune.data.conversation import Message
from lora_tune.errors import CheckFailed, Problem

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_tune.data.chat_template import ChatTemplate

TOP_K = 10
CONTINUATION = 3  # tokens after the prompt, so that four positions are compared
MOST_IDS = 4096  # of a prompt in a stranger's file
PROMPTS: tuple[str, ...] = (
    "What is the capital of France?",
    "List three things that float on water.",
    "Write one short sentence about a dog in the snow.",
    "Tom has 12 apples and gives 5 of them to Ann. How many apples does Tom have now?",
    "Summarise in one sentence: The bridge was closed on Monday because of the storm, and opened again on Wednesday.",
)
"""Fixed and public, so that no row of anybody's data lies in the file."""

_DTYPE_TOLERANCE = {"float32": 2e-3, "float16": 6e-2, "bfloat16": 4e-1}
_QUANTIZED = {"none": 0.0, "nf4": 2e-3, "fp4": 2e-3, "int8": 1e-1}
TOLERANCE: dict[str, float] = {
    f"{device}/{dtype}/{quantize}": max(tolerance, least)
    for device in ("cpu", "cuda")
    for dtype, tolerance in _DTYPE_TOLERANCE.items()
    for quantize, least in _QUANTIZED.items()
}
"""{device/compute dtype/quantization: allowed root mean square difference of log-probabilities, in nats}.

Where the numbers come from: a log-probability is a difference of logits; around 16, neighbouring numbers of float32,
float16 and bfloat16 are 2e-6, 0.016 and 0.125 apart, and summing in another order (threads, batch, kernel, device)
moves the last bits. Measured on a CPU with 12 random layers and logits of deviation 6, between 1 and 2 threads, alone
and in a padded batch, SDPA and eager attention: at most 1e-5 (float32), 1.6e-2 (float16), 1.2e-1 (bfloat16) nats. The
bounds are 3 to 4 times that; float32 has more room, because GPUs multiply it in more ways. NF4 and FP4 have the same
codes everywhere and add nothing; int8 also rounds the activations, on GPUs from float16.
"""
_SCALE_ROOM = 0.25  # an adapter at half, double or sqrt(rank) times its scale is far outside


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Position(_Strict):
    """The most likely tokens of adapter and base after one token, with the log-probability that each gives them."""

    ids: list[int]
    base: list[float]
    adapter: list[float]


class _Vector(_Strict):
    """One prompt: messages, ids as rendered for serving, the continuation, the positions from the last id on."""

    messages: list[dict[str, str]]
    ids: list[int]
    continuation: list[int]
    positions: list[_Position]


class _Vectors(_Strict):
    format: Literal[1]
    top_k: int
    made_on: str
    tolerance: dict[str, float]
    prompts: Annotated[list[_Vector], Field(min_length=1, max_length=64)]


@dataclass(frozen=True, slots=True)
class Replay:
    """How far a replay is from the stored numbers: root mean squares over log-probabilities, in nats."""

    problems: tuple[Problem, ...]
    base: float
    """Base now against base then."""
    adapter: float
    """Adapter now against adapter then."""
    effect: float
    """Adapter against base, as stored."""
    scale: float
    """Strength of the adapter's effect now over that stored: 0 not applied, 1 as trained."""
    tolerance: float


def precision(*, device: str, compute_dtype: str, quantize: str) -> str:
    """The key into `TOLERANCE`, such as `cuda/bfloat16/nf4`."""
    return f"{device}/{compute_dtype}/{quantize}"


def make_test_vectors(
    model: PeftModel, chat: ChatTemplate, *, made_on: str, prompts: Sequence[str] = PROMPTS
) -> dict[str, Any]:
    """The content of `test_vectors.json`, from one loaded model with its adapter on and off.

    `made_on` is the `precision` of this process. The model comes back in the mode (train or eval) in which it was;
    global random numbers are not touched.
    """
    stored = []
    with _evaluating(model):
        for prompt in prompts:
            ids = list(chat.prompt_ids((Message("user", prompt),)))
            continuation: list[int] = []
            for _ in range(CONTINUATION):
                continuation.append(int(_log_probs(model, [*ids, *continuation], last=1)[0].argmax()))
            adapter = _log_probs(model, [*ids, *continuation], last=CONTINUATION + 1)
            with model.disable_adapter():
                base = _log_probs(model, [*ids, *continuation], last=CONTINUATION + 1)
            positions = [_position(*rows) for rows in zip(base, adapter, strict=True)]
            turns = [{"role": "user", "content": prompt}]
            stored.append({"messages": turns, "ids": ids, "continuation": continuation, "positions": positions})
    return {"format": 1, "top_k": TOP_K, "made_on": made_on, "tolerance": TOLERANCE, "prompts": stored}


def replay(model: PeftModel, chat: ChatTemplate, vectors: object, *, here: str, where: str) -> Replay:
    """Compare a freshly loaded base, template and adapter with the stored vectors.

    `here` is the `precision` of this process, `where` the file that problems name. Finds another base of the same
    shape, a template that renders otherwise, an adapter that is not applied or applied at another scale.

    Raises: CheckFailed where the vectors themselves are damaged.
    """
    known = _parse(vectors, vocabulary=_vocabulary(model), where=where)
    numbers = _Numbers()
    with _evaluating(model):
        for vector in known.prompts:
            ids, count = [*vector.ids, *vector.continuation], len(vector.positions)
            adapter = _log_probs(model, ids, last=count)
            with model.disable_adapter():
                base = _log_probs(model, ids, last=count)
            for number, position in enumerate(vector.positions):
                numbers.add(position, base[number, position.ids], adapter[number, position.ids])
    found = numbers.compare(tolerance=TOLERANCE[here], where=where)
    return replace(found, problems=(*_check_prompts(known, chat, where=where), *found.problems))


def vector_ids(vectors: object, *, vocabulary: int, where: str) -> list[list[int]]:
    """The token ids of each stored prompt with its continuation. Raises: CheckFailed where the vectors are damaged."""
    return [
        [*vector.ids, *vector.continuation] for vector in _parse(vectors, vocabulary=vocabulary, where=where).prompts
    ]


class _Numbers:
    """Log-probabilities at the same places, then and now, of base and adapter."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []

    def add(self, then: _Position, base: torch.Tensor, adapter: torch.Tensor) -> None:
        """The numbers of one position: stored, and `base` and `adapter` (K,) now."""
        stored = torch.tensor([then.base, then.adapter], dtype=torch.float64)
        self._rows.append(torch.cat([stored, torch.stack([base, adapter]).double()]))

    def compare(self, *, tolerance: float, where: str) -> Replay:
        """The distances, and what they mean."""
        base_then, adapter_then, base_now, adapter_now = torch.cat(self._rows, dim=1)
        then, now = adapter_then - base_then, adapter_now - base_now
        base, adapter, effect = _rms(base_now - base_then), _rms(adapter_now - adapter_then), _rms(then)
        scale = float((now * then).sum() / then.square().sum().clamp_min(1e-30))
        doubt = 1.5 * tolerance / max(effect, 1e-30) / len(self._rows) ** 0.5
        found = Replay((), base, adapter, effect, scale, tolerance)
        problem = _meaning(found, doubt=doubt)
        return found if problem is None else replace(found, problems=(replace(problem, file=where),))


def _meaning(found: Replay, *, doubt: float) -> Problem | None:
    """What the distances say; a NaN is wrong. `doubt`: standard error of `scale` at the most rounding allowed."""
    allowed = f"at most {found.tolerance:g} are allowed"
    if not found.base <= found.tolerance:
        reason = f"the base answers otherwise than in training: {found.base:.3g} nats apart, {allowed}"
        return Problem(reason, "give the very base, quantized and computed as the manifest says")
    is_clear = doubt <= _SCALE_ROOM / 2
    if is_clear and not abs(found.scale) > _SCALE_ROOM:
        reason = f"the adapter is not applied: its effect is {found.scale:.2f} times that of training"
        return Problem(reason, "load it through lora_tune, or as the model card says")
    if is_clear and not abs(found.scale - 1) <= _SCALE_ROOM:
        reason = f"the adapter is applied at another scale: its effect is {found.scale:.2f} times that of training"
        return Problem(reason, "load it with the alpha, rank and use_rslora of its configuration")
    if not found.adapter <= found.tolerance:
        reason = f"the adapter answers otherwise than in training: {found.adapter:.3g} nats apart, {allowed}"
        return Problem(reason, "load the very files of the folder, in the dtype of the manifest")
    if not is_clear:
        reason = f"the adapter changes too little to prove that it is applied: {found.effect:.3g} nats"
        fix = f"rounding is up to {found.tolerance:g}: train longer, or at a higher learning rate"
        return Problem(reason, fix, severity="warning")
    return None


def _check_prompts(known: _Vectors, chat: ChatTemplate, *, where: str) -> list[Problem]:
    """The stored prompts must render to the stored ids; a template that writes today's date cannot be held to that."""
    if "strftime_now" in chat.text:
        return []
    changed = []
    for number, vector in enumerate(known.prompts):
        turns = tuple(Message("user", turn.get("content", "")) for turn in vector.messages)
        if list(chat.prompt_ids(turns)) != vector.ids:
            changed.append(number)
    if not changed:
        return []
    reason = (
        f"the chat template renders {len(changed)} of {len(known.prompts)} prompts to other tokens than in training"
    )
    return [Problem(reason, "use the folder's own tokenizer and template", where, key=f"prompts.{changed[0]}.ids")]


def _parse(vectors: object, *, vocabulary: int, where: str) -> _Vectors:
    try:
        known = _Vectors.model_validate(vectors)
    except ValidationError as error:
        issue = error.errors()[0]
        key = ".".join(map(str, issue["loc"]))
        raise CheckFailed(
            Problem(f"no test vectors of format 1: {issue['msg']}", "write the folder again", where, key=key)
        ) from None
    for number, vector in enumerate(known.prompts):
        ids = [*vector.ids, *vector.continuation]
        tokens = [*ids, *(token for position in vector.positions for token in position.ids)]
        whole = all(len(p.ids) == len(p.base) == len(p.adapter) > 0 for p in vector.positions)
        if not (
            whole and 0 < len(vector.positions) <= len(ids) <= MOST_IDS and 0 <= min(tokens) <= max(tokens) < vocabulary
        ):
            fault = "token ids and log-probabilities that do not fit together, or not to the base"
            raise CheckFailed(Problem(fault, "write the folder again", where, key=f"prompts.{number}"))
    return known


def _position(base: torch.Tensor, adapter: torch.Tensor) -> dict[str, list[Any]]:
    """The top k of the adapter, then those of the base that are not among them; both log-probabilities (V,)."""
    top = [int(token) for row in (adapter, base) for token in row.topk(min(TOP_K, len(row))).indices]
    ids = list(dict.fromkeys(top))
    return {"ids": ids, "base": _rounded(base[ids]), "adapter": _rounded(adapter[ids])}


def _rounded(log_probs: torch.Tensor) -> list[float]:
    return [round(float(value), 6) for value in log_probs]


def _log_probs(model: PeftModel, ids: Sequence[int], *, last: int) -> torch.Tensor:
    """Log-probabilities (last, V) in float32, on the CPU, after each of the last ids; one prompt alone, no padding."""
    row = torch.tensor([list(ids)], device=torch.device(model.device))
    logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, -last:]
    return logits.float().log_softmax(dim=-1).cpu()


def _vocabulary(model: PeftModel) -> int:
    base = cast("PreTrainedModel", model.get_base_model())
    return int(base.config.get_text_config().vocab_size)


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


@contextmanager
def _evaluating(model: PeftModel) -> Iterator[None]:
    """Evaluation mode without gradients, and the mode of before again."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)

"""Attention over packed documents without a mask: it is told where they begin.

    tokens      a a a a b b c c c        one row, positions restart at every document
    bounds      0       4   6     9      `cu_seq_lens_q` of the batch

With a mask, attention costs the square of a row, and keys and values are repeated for grouped queries. Here each
document costs its own square. On a GPU in 16 bit `torch.nn.attention.varlen` computes all of them at once (from
PyTorch 2.11 on; flash-attn is not needed); elsewhere one call of SDPA does each document.

A forward pass that says nothing of bounds (an evaluation, an answer) goes through SDPA and its mask as ever. One that
does gets an empty mask of four dimensions, which transformers hands on as it is: a layer that is not told the bounds
fails at it instead of letting documents see each other, and no mask is looked for on the host.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from lora_tune.recipe import Base

NAME = "varlen"
BOUNDS = "cu_seq_lens_q"
_LARGEST_HEAD = 256  # of the kernel, which takes multiples of 8
_HALVES = (torch.bfloat16, torch.float16)
_SAME = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}  # of a few tokens' logits, relative
_MISFITS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)  # what a strange model raises
_UNKNOWN = ("softcap", "s_aux", "position_bias")  # what layers may ask for and neither way here computes


def use_varlen(model: Any, base: Base) -> str:
    """Let training tell attention the bounds of packed documents, where `base.attention` and the model allow it.

    `auto` takes it where the kernel runs, `varlen` everywhere. `model` may be a PEFT model. A few tokens go through
    both ways first; a model that gives other numbers keeps its own attention. Nothing but the name of its attention
    changes (`is_used`).

    Returns:
        Why it was asked for and is not used, in a few words; else nothing.
    """
    if base.attention not in ("auto", NAME):
        return ""
    config = model.config.get_text_config()
    if base.attention == "auto" and not _kernel_is_for(model, config):
        return ""
    reason = _not_for(config) or _differs(model, config)
    if reason:
        return reason
    _tell_decoder(model)
    config._attn_implementation = NAME
    return ""


def is_used(model: Any) -> bool:
    """Whether the training batches of this model should say the bounds of their documents."""
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def keep_out_of_graphs(model: Any) -> None:
    """Where no kernel runs, `torch.compile` leaves attention alone: a graph would hold for one set of lengths only."""
    if is_used(model) and not _kernel_is_for(model, model.config.get_text_config()):
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, torch.compiler.disable(on_attention))


def _not_for(config: Any) -> str:
    """What of a model's configuration neither the kernel nor SDPA by document computes."""
    if config._attn_implementation != "sdpa":
        return f"transformers computes attention of this model by {config._attn_implementation}"
    if others := sorted(set(_kinds(config)) - {"full_attention", "sliding_attention"}):
        return f"the model has layers of {others[0]}"
    if any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop")):
        return "the model has dropout in its attention"
    return ""


def _kinds(config: Any) -> list[str]:
    """What each layer attends to."""
    default = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return list(getattr(config, "layer_types", None) or [default] * config.num_hidden_layers)


def _dtype_of(model: Any) -> torch.dtype:
    """Of activations; the device is asked of the model, whose embedding may be elsewhere."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def _kernel_is_for(model: Any, config: Any) -> bool:
    """Whether the kernel computes this model's attention where it lies."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _make_ready(model.device) and _dtype_of(model) in _HALVES and _takes_heads(head_size)


def _takes_heads(head_size: int) -> bool:
    return head_size % 8 == 0 and head_size <= _LARGEST_HEAD


class _Ready:
    """The kernel of this process's GPU, looked up once: layers that are compiled read nothing but names."""

    kernel: Callable[..., Any] | None = None
    groups: Literal["told", "taken", "repeated"] = "repeated"  # fewer heads of keys than of queries


def _make_ready(device: torch.device) -> bool:
    """Look the kernel up for a device; whether there is one."""
    if _Ready.kernel is None and _is_new_enough(device) and (found := _kernel()):
        told = "enable_gqa" in inspect.signature(found).parameters
        _Ready.groups = "told" if told else "taken" if _takes_groups(found, device) else "repeated"
        _Ready.kernel = found
    return _Ready.kernel is not None


def _is_new_enough(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _kernel() -> Callable[..., Any] | None:
    """`varlen_attn` where this PyTorch has it with windows, which is from 2.11 on."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


def _tell_decoder(model: Any) -> None:
    """Give every pass of the decoder that says bounds the empty mask."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(whole, whole.base_model_prefix, whole)

    def before(module: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        bounds_D = given.get(BOUNDS)
        if bounds_D is not None and given.get("attention_mask") is None:
            given["attention_mask"] = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=bounds_D.device)
        return inputs, given

    decoder.register_forward_pre_hook(before, with_kwargs=True)


# -- do a few tokens give the same numbers? ---------------------------------------------------------------------------


@torch.no_grad()
def _differs(model: Any, config: Any) -> str:
    """Why this model does not train the same with bounds as with a mask, or nothing."""
    _register()
    lengths = (5, 3, 6)
    device = model.device
    positions_BT = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    ids_BT = (torch.arange(sum(lengths)) * 37 % min(1000, config.vocab_size))[None].to(device)
    bounds_D = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    batch = {"input_ids": ids_BT, "position_ids": positions_BT, "use_cache": False}
    empty = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
    told = {BOUNDS: bounds_D, "cu_seq_lens_k": bounds_D, "max_length_q": 6, "max_length_k": 6, "attention_mask": empty}
    with _in_evaluation(model):
        expected = model(**batch).logits.float()
        try:
            with _named(config), _windows_seen() as windows:
                found = model(**batch, **told).logits.float()
        except _MISFITS as error:
            return (str(error).strip().splitlines() or [type(error).__name__])[0]
    window = getattr(config, "sliding_window", None)
    if windows != [window if kind == "sliding_attention" else None for kind in _kinds(config)]:
        return "its layers do not say how far they look"
    away = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    return "" if away <= _SAME.get(_dtype_of(model), 1e-4) else f"a few tokens come out otherwise, by {away:.1%}"


@cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, on_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _named(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def _windows_seen() -> Iterator[list[int | None]]:
    """The window that every layer asks for, in the order of the calls."""
    from transformers import AttentionInterface

    seen: list[int | None] = []

    def on_watched(*inputs: Any, **given: Any) -> Any:
        seen.append(given.get("sliding_window"))
        return on_attention(*inputs, **given)

    AttentionInterface.register(NAME, on_watched)
    try:
        yield seen
    finally:
        AttentionInterface.register(NAME, on_attention)


# -- what a layer calls -----------------------------------------------------------------------------------------------


def on_attention(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one layer, (B, T, heads, D); with `cu_seq_lens_q` every document by itself (B is 1).

    Keys and values may have fewer heads than queries. With `sliding_window` W a token sees itself and W - 1 before it.

    Raises:
        ValueError: the layer was not told the bounds, or asks for what is not computed here.
    """
    bounds_D, is_empty = given.get(BOUNDS), attention_mask is not None and not attention_mask.numel()
    if is_empty and bounds_D is None:
        raise ValueError("a layer of attention is not told the bounds of packed documents")
    if bounds_D is None or not (is_empty or attention_mask is None):
        from transformers import AttentionInterface

        own = AttentionInterface()["sdpa"]
        return own(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **given)  # type: ignore[no-any-return]
    if unknown := [name for name in _UNKNOWN if given.get(name) is not None]:
        raise ValueError(f"its attention has {unknown[0]}")
    causal = getattr(module, "is_causal", True) if given.get("is_causal") is None else given["is_causal"]
    if given.get("dropout") or query_BHTD.shape[0] != 1 or not causal:
        raise ValueError("its attention is not causal, has dropout, or goes over several rows")
    scale, window = given.get("scaling"), given.get("sliding_window")
    dtype = _dtype(query_BHTD)
    if _is_for_kernel(query_BHTD, value_BHTD, dtype):
        parts = [tensor[0].transpose(0, 1).to(dtype) for tensor in (query_BHTD, key_BHTD, value_BHTD)]
        longest = int(given["max_length_q"])
        return by_kernel(*parts, bounds_D=bounds_D, longest=longest, scale=scale, window=window)[None], None
    return by_document(query_BHTD, key_BHTD, value_BHTD, bounds_D=bounds_D, scale=scale, window=window), None


def _is_for_kernel(query: torch.Tensor, value: torch.Tensor, dtype: torch.dtype) -> bool:
    same = query.shape[-1] == value.shape[-1]
    return query.is_cuda and _Ready.kernel is not None and dtype in _HALVES and same and _takes_heads(query.shape[-1])


def _dtype(like: torch.Tensor) -> torch.dtype:
    """What attention is computed in: queries may be float32 under autocast, where a norm made them so."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def by_document(
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    *,
    bounds_D: torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """One call of SDPA for each document: any device and dtype; (1, T, heads, D)."""
    lengths = [length for length in bounds_D.diff().tolist() if length]
    outputs = []
    for query, key, value in zip(
        query_BHTD.split(lengths, 2), key_BHTD.split(lengths, 2), value_BHTD.split(lengths, 2), strict=True
    ):
        far = window is not None and query.shape[2] > window
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=_band(query.shape[2], window, query.device) if far else None,
                is_causal=not far,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """What each token (rows) sees of a document (columns) through a window."""
    whole = torch.ones(length, length, dtype=torch.bool, device=device)
    return whole.tril() if window is None else whole.tril().triu(1 - window)


def by_kernel(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    *,
    bounds_D: torch.Tensor,
    longest: int,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """All documents in one launch of `varlen_attn`, (T, heads, D): CUDA, 16 bit. `longest` may be too large."""
    if _Ready.kernel is None:
        raise ValueError("no kernel was found for this device")
    groups, more = query_THD.shape[1] // key_THD.shape[1], {}
    if groups > 1 and _Ready.groups == "told":
        more["enable_gqa"] = True
    elif groups > 1 and _Ready.groups == "repeated":
        key_THD, value_THD = key_THD.repeat_interleave(groups, 1), value_THD.repeat_interleave(groups, 1)
    window_size = (-1 if window is None else window - 1, 0)
    return _Ready.kernel(
        query_THD,
        key_THD,
        value_THD,
        bounds_D,
        bounds_D,
        longest,
        longest,
        scale=scale,
        window_size=window_size,
        **more,
    )


def _takes_groups(kernel: Callable[..., Any], device: torch.device) -> bool:
    """Whether a kernel that does not say so (2.11) takes fewer heads of keys than of queries: asked with numbers."""
    bounds_D = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    results = []
    for repeats in (1, 2):
        draw = torch.Generator().manual_seed(0)
        parts = [torch.randn(8, heads, 16, generator=draw).to(device, torch.float16) for heads in (4, 2, 2)]
        query, key, value = (part.requires_grad_() for part in parts)
        several = [part.repeat_interleave(repeats, 1) for part in (key, value)]
        try:
            with torch.enable_grad():
                out = kernel(query, *several, bounds_D, bounds_D, 5, 5, window_size=(-1, 0))
                results.append([out, *torch.autograd.grad(out.float().square().sum(), parts)])
        except (RuntimeError, ValueError):
            return False
    return all(
        bool((one.float() - two.float()).norm() <= 3e-2 * two.float().norm()) for one, two in zip(*results, strict=True)
    )

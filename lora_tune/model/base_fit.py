"""Does the recipe's adapter fit this base: names, ranks, lengths, combinations, from headers and config.json (cold)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_tune.errors import Problem, Severity
from lora_tune.model.shape import read_shape
from lora_tune.model.weights import TensorInfo
from lora_tune.recipe import Lora, Train

HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in", "embed_positions", "word_embeddings", "position_embeddings")
_FROM_WEIGHTS = ("pissa", "olora", "loftq")
_EXPERT = ".experts."
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")


def matches(name: str, modules: Iterable[str]) -> list[str]:
    """The modules that a name means: the whole dotted path, or the end of it, as PEFT matches `target_modules`."""
    return [module for module in modules if module == name or module.endswith("." + name)]


def end_of(module: str) -> str:
    """The last part of a dotted module name."""
    return module.rpartition(".")[2]


def unmatched(key: str, names: Iterable[str], modules: Iterable[str]) -> list[Problem]:
    """One problem for each plain name that means none of the modules, with the nearest name that does."""
    modules = list(modules)
    ends = sorted({end_of(module) for module in modules} - {str(number) for number in range(1000)})
    problems = []
    for name in names:
        if matches(name, modules) or not _PLAIN.fullmatch(name):
            continue
        near = difflib.get_close_matches(end_of(name), ends, n=1)
        fix = f"did you mean {near[0]}?" if near else f"there are: {', '.join(ends[:20])}"
        problems.append(Problem(f"matches no layer of the base, got {name!r}", fix, key=key))
    return problems


def linear_modules(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...] | None]:
    """The linear layers in the headers of a base, by name, with (out, in); None where they are stored quantized."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    for name, info in infos.items():
        module, _, last = name.rpartition(".")
        if last != "weight" or len(info.shape) != 2 or end_of(module) in (*HEADS, *EMBEDDINGS):
            continue
        shapes[module] = None if info.dtype in ("U8", "I8") else info.shape
    return shapes


def combination_problems(lora: Lora, *, quantize: str, stored: str | None) -> list[Problem]:
    """Combinations that cannot work; each was tried. `stored` is how the base's files are quantized already, if so."""
    problems = []
    if lora.method in _FROM_WEIGHTS and stored:
        problems.append(
            Problem(
                f"{lora.method} starts from full-precision weights, but the base is stored as {stored}",
                "name the full-precision repository of the base, or set lora.method: lora",
                key="lora.method",
            )
        )
    if lora.method == "loftq" and quantize == "none":
        problems.append(
            Problem(
                "loftq starts from what quantization takes from the weights, but base.quantize is none",
                "set base.quantize: nf4, or lora.method: lora",
                key="lora.method",
            )
        )
    if lora.method == "dora" and quantize == "int8":  # the first forward loses the int8 scales (peft 0.21.2)
        problems.append(
            Problem(
                "dora does not work on an int8 base", "set base.quantize: nf4, or lora.method: lora", key="lora.method"
            )
        )
    if lora.start_from and lora.method in (*_FROM_WEIGHTS, "eva"):
        problems.append(
            Problem(
                f"the adapter to continue brings its own start, but lora.method is {lora.method}",
                "set lora.method: lora, with rank and alpha of that adapter's adapter_config.json",
                key="lora.start_from",
            )
        )
    if lora.new_tokens:
        full = [name for name in lora.modules_to_save if end_of(name) in (*HEADS, *EMBEDDINGS)]
        if full:
            problems.append(
                Problem(
                    f"trains all rows of {full[0]}, and lora.new_tokens some of its rows",
                    "leave out one of the two",
                    key="lora.modules_to_save",
                )
            )
    return problems + _name_problems(lora)


def _name_problems(lora: Lora) -> list[Problem]:
    problems = []
    for name in lora.targets if lora.targets != "all-linear" else ():
        if end_of(name) in HEADS:
            problems.append(
                Problem(
                    f"the output head cannot have an adapter, got {name!r}: the loss reads its weight directly",
                    f"take it out; to train it in full: lora.modules_to_save: [{end_of(name)}]",
                    key="lora.targets",
                )
            )
        if end_of(name) in EMBEDDINGS:
            problems.append(
                Problem(
                    f"an embedding is no linear layer, got {name!r}",
                    f"to train it in full: lora.modules_to_save: [{end_of(name)}]; new tokens alone: lora.new_tokens",
                    key="lora.targets",
                )
            )
    for key, names in (("modules_to_save", lora.modules_to_save), *_patterns(lora)):
        for name in names:
            if not _PLAIN.fullmatch(name):
                reason = f"must be a plain module name such as q_proj, got {name!r}"
                problems.append(Problem(reason, "regular expressions are not supported", key=f"lora.{key}"))
    return problems


def _patterns(lora: Lora) -> tuple[tuple[str, Iterable[str]], ...]:
    return ("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)


def layer_problems(lora: Lora, infos: Mapping[str, TensorInfo], *, quantize: str, experts: int) -> list[Problem]:
    """Names that match nothing, modules that cannot be trained in full, ranks that a layer cannot use."""
    shapes = linear_modules(infos)
    dense = {module: shape for module, shape in shapes.items() if not (experts and _EXPERT in module)}
    named = tuple(lora.targets) if lora.targets != "all-linear" else ()
    named = tuple(name for name in named if end_of(name) not in (*HEADS, *EMBEDDINGS))
    problems = unmatched("lora.targets", named, dense)
    if experts:
        problems = [_expert_problem(problem, shapes) for problem in problems]
    targets = {m: dense[m] for name in named for m in matches(name, dense)} if named else dense
    for key, names in _patterns(lora):
        problems += unmatched(f"lora.{key}", names, targets)
    everything = sorted({part for name in infos for part in _prefixes(name)})
    problems += unmatched("lora.modules_to_save", [n for n in lora.modules_to_save if n not in HEADS], everything)
    problems += full_training_problems(lora, shapes, targets, quantize=quantize)
    return problems + rank_problems(lora, targets)


def _expert_problem(problem: Problem, shapes: Mapping[str, Any]) -> Problem:
    name = problem.reason.split("'")[1]
    if not any(_EXPERT in module for module in matches(name, shapes)):
        return problem
    return Problem(
        f"the experts' weights are held in one tensor for all experts and cannot have an adapter, got {name!r}",
        "take the attention layers, or all-linear",
        key="lora.targets",
    )


def adapted_experts(targets: Iterable[str]) -> list[Problem]:
    """A base that holds each expert as layers of its own: an adapter on all of them is refused before it is made."""
    experts = [module for module in targets if _EXPERT in module]
    if not experts:
        return []
    reason = f"{len(experts)} layers of single experts would get an adapter, such as {experts[0]}"
    return [Problem(reason, "name the attention layers, such as [q_proj, v_proj]", key="lora.targets")]


def _prefixes(tensor_name: str) -> list[str]:
    parts = tensor_name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def full_training_problems(
    lora: Lora, linear: Iterable[str], targets: Iterable[str], *, quantize: str
) -> list[Problem]:
    """Modules to be trained in full that have an adapter as well, or are quantized."""
    linear, targets = list(linear), set(targets)
    problems = []
    for name in lora.modules_to_save:
        inside = [m for m in linear if m == name or m.endswith("." + name) or f".{name}." in f".{m}"]
        if set(inside) & targets:
            reason, fix = f"{name!r} is trained in full and has an adapter too", "name its layers once"
            problems.append(Problem(reason, fix, key="lora.modules_to_save"))
        elif inside and quantize != "none":
            reason = f"a quantized layer cannot be trained in full, got {name!r}"
            problems.append(Problem(reason, "set base.quantize: none", key="lora.modules_to_save"))
    return problems


def rank_problems(lora: Lora, targets: Mapping[str, tuple[int, ...] | None]) -> list[Problem]:
    """Ranks above what a layer can use: wasted for most methods, impossible for those that start from the weights."""
    for module, shape in sorted(targets.items()):
        rank = next((r for name, r in lora.rank_pattern.items() if matches(name, [module])), lora.rank)
        if shape is None or rank <= min(shape):
            continue
        reason = f"rank {rank} is above the {min(shape)} that {module} ({shape[0]}×{shape[1]}) can use"
        severity: Severity = "error" if lora.method in _FROM_WEIGHTS else "warning"
        return [Problem(reason, "take a lower rank", key="lora.rank", severity=severity)]
    return []


def length_problems(config: Mapping[str, Any], train: Train) -> list[Problem]:
    """`max_length` beyond what the base was made for."""
    positions, window = config.get("max_position_embeddings") or config.get("n_positions"), config.get("sliding_window")
    problems = []
    if isinstance(positions, int) and train.max_length > positions:
        problems.append(
            Problem(
                f"{train.max_length} is beyond the {positions} positions of the base",
                f"set it to {positions} or less",
                key="train.max_length",
                severity="warning",
            )
        )
    uses_window = config.get("use_sliding_window", True) is not False
    if isinstance(window, int) and uses_window and train.max_length > window:
        problems.append(
            Problem(
                f"layers with a sliding window see the last {window} tokens of {train.max_length}",
                key="train.max_length",
                severity="note",
            )
        )
    return problems


def layer_count_problems(config: Mapping[str, Any], train: Train) -> list[Problem]:
    """More layers to recompute than the base has. Raises: UsageError where config.json does not say how many it has."""
    asked = train.gradient_checkpointing
    if isinstance(asked, str) or asked <= (layers := read_shape(config).layers):
        return []
    fix = f"set it to all, or to {layers} or less"
    return [Problem(f"the base has {layers} layers, got {asked}", fix, key="train.gradient_checkpointing")]


def expert_notes(lora: Lora, *, experts: int, quantize: str) -> list[Problem]:
    """What a mixture of experts does not get: adapters on its experts, and their quantization."""
    if not experts:
        return []
    notes = []
    if lora.targets == "all-linear":
        reason = f"the weights of the {experts} experts get no adapter, only attention and other dense layers do"
        notes.append(Problem(reason, key="lora.targets", severity="note"))
    if quantize != "none":
        reason = "the experts are held in 16 bit: bitsandbytes quantizes the dense layers alone"
        fix = "count on the memory of the unquantized base"
        notes.append(Problem(reason, fix, key="base.quantize", severity="warning"))
    return notes

"""The model card (README.md) of an adapter folder: the hub's metadata, scores with intervals, samples, how to load."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_tune.adapter.folder import Manifest, ReplanRecord
from lora_tune.model.source import BaseSource
from lora_tune.recipe import Recipe

_LICENSE_UNKNOWN = "Unknown: the base names none here. Look up the licences of base and data before sharing."
_FOLDER, _RECIPE = "path/to/this/folder", "path/to/the/recipe.yaml"
_MOST_SAMPLE = 2000  # characters of one text


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out row with the answers of base and adapter."""

    prompt: str
    reference: str
    base: str
    adapter: str


def model_card(
    manifest: Manifest,
    *,
    name: str,
    recipe: Recipe,
    config: Mapping[str, Any],
    samples: Sequence[Sample],
    source: BaseSource,
) -> str:
    """The whole card as Markdown with YAML in front. `config` is the content of adapter_config.json."""
    license_name, commands = base_license(source), repeat_commands(source.kind)
    parts = [
        _metadata(manifest, license_name=license_name),
        f"# {name}\n\n{_summary(manifest, config)}",
        _scores(manifest, commands),
        _samples(samples),
        _loading(manifest, _new_rows(config, source)),
        _data(manifest, commands),
        _training(manifest, recipe, config, commands),
        _verification(commands["vectors"]),
        f"## Licence\n\n{license_name + ', from the base.' if license_name else _LICENSE_UNKNOWN}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_license(source: BaseSource) -> str | None:
    """The licence that the base's own card declares, where the card lies beside the base."""
    card = source.folder / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8", errors="replace")[:20_000], re.DOTALL)
    found = re.search(r"^license:\s*([A-Za-z0-9][A-Za-z0-9.+-]*)\s*$", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def _metadata(manifest: Manifest, *, license_name: str | None) -> str:
    """The YAML that the hub reads; `base_model` and `datasets` only hold names that exist there."""
    from huggingface_hub import ModelCardData

    is_on_hub = manifest.base.kind == "hub"
    data = ModelCardData(
        base_model=manifest.base.name if is_on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "adapter", "lora_tune"],
        datasets=sorted({item.name for item in manifest.data if item.revision}) or None,
        license=license_name or "other",
        license_name=None if license_name else "unknown",
    )
    text = data.to_yaml()
    return f"---\n{text}\nbase_model_relation: adapter\n---" if is_on_hub else f"---\n{text}\n---"


def _summary(manifest: Manifest, config: Mapping[str, Any]) -> str:
    base, training = manifest.base, manifest.training
    where = f" at revision `{base.revision}`" if base.revision else ""
    link = f"[{base.name}](https://huggingface.co/{base.name})" if base.kind == "hub" else f"`{base.name}`"
    rows = manifest.training.rows or sum(item.rows for item in manifest.data)
    kind = {"builtin": " (the base that lora_tune brings along)", "local": " (a local folder)", "hub": ""}[base.kind]
    return (
        f"A {training.method} adapter of rank {config['r']} for {link}{kind}{where}, trained by {manifest.tool} on "
        f"{_plural(rows, 'row')} for {_plural(training.steps, 'step')}, with the base held in {_held(manifest)}."
    )


def held_in(quantize: str, *, compute_dtype: str, double: Literal["on", "off"]) -> str:
    """How the base was held in training, in words."""
    if quantize == "none":
        return compute_dtype
    words = " with double quantization" if double == "on" and quantize in ("nf4", "fp4") else ""
    return f"{quantize}{words}, computing in {compute_dtype}"


def _held(manifest: Manifest) -> str:
    base = manifest.base
    return held_in(base.quantize, compute_dtype=base.compute_dtype, double="on" if base.double_quant else "off")


def repeat_commands(base: Literal["hub", "builtin", "local"]) -> dict[str, str]:
    """The command that makes the numbers of a section again, by section of card and report; `base`: where it is from.

    Scores come from the folder itself, called where the data lies; what training did from the recipe, with its seed.
    """
    where = " --base path/to/the/base" if base == "local" else ""
    again = f"lora-tune run {_RECIPE}"
    return {
        **dict.fromkeys(("scores", "tasks", "samples"), f"lora-tune eval {_FOLDER}{where}"),
        **dict.fromkeys(("training", "curves", "hard", "cost"), again),
        **dict.fromkeys(("data", "overlap"), f"lora-tune preview {_RECIPE} --json"),
        "vectors": f"lora-tune adapters verify {_FOLDER}{where}",
    }


def _again(command: str, *, where: str = "") -> str:
    return f"Made again by `{command}`{', called ' + where if where else ''}."


def _scores(manifest: Manifest, commands: Mapping[str, str]) -> str:
    if not manifest.scores:
        return "## Scores\n\nNot measured: the recipe held no rows out."
    rows = [
        (
            f"{metric} ({score.direction} is better)" if score.direction else metric,
            f"{score.base:.4g}",
            f"{score.adapter:.4g}",
            f"{score.adapter - score.base:+.4g} [{score.low:+.4g}, {score.high:+.4g}]",
            score.rows,
        )
        for metric, score in manifest.scores.items()
    ]
    table = _table(("metric", "base", "adapter", "difference [95 % interval]", "held-out rows"), rows)
    intro = "Base and adapter on the same held-out rows, paired bootstrap; `report.html` shows them row by row."
    return f"## Scores\n\n{intro}\n\n{table}\n\n{_again(commands['scores'], where='where the data lies')}"


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    texts = ["## Before and after\n\nHeld-out rows, greedy answers."]
    for sample in samples:
        fields = (
            ("prompt", sample.prompt),
            ("reference", sample.reference),
            ("base", sample.base),
            ("adapter", sample.adapter),
        )
        texts += [f"**{title}**\n\n{_fenced(text)}" for title, text in fields]
        texts.append("---")
    return "\n\n".join(texts[:-1])


def _loading(manifest: Manifest, new_rows: int) -> str:
    base = manifest.base
    name = {
        "hub": base.name,
        "local": f"path/to/{base.name}",
        "builtin": f"lora_tune/builtin/{base.name.removeprefix('builtin:')}",
    }[base.kind]
    resize = f"base.resize_token_embeddings({new_rows})  # room for the new tokens\n" if new_rows else ""
    revision = f', revision="{base.revision}"' if base.revision else ""
    return (
        "## Load it\n\n```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{name}"{revision}, dtype="{base.compute_dtype}")\n'
        f"{resize}"
        'model = PeftModel.from_pretrained(base, "path/to/this/folder", autocast_adapter_dtype=False)\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```\n\n'
        "Prompts are rendered by this folder's `chat_template.jinja` "
        f"({_ORIGINS[manifest.chat.origin]}); an answer ends at token id "
        f"{' or '.join(map(str, manifest.chat.stop_ids))}."
    )


def _new_rows(config: Mapping[str, Any], source: BaseSource) -> int:
    """How many rows the embeddings need for the trained tokens; 0 where the base has them."""
    trained = config.get("trainable_token_indices") or {}
    needed = 1 + max((index for ids in trained.values() for index in ids), default=-1)
    return needed if needed > source.config.get("vocab_size", needed) else 0


_ORIGINS = {
    "base": "the base's own",
    "file": "given by the recipe",
    "default": "lora_tune's default, as the base has none",
}


def _data(manifest: Manifest, commands: Mapping[str, str]) -> str:
    rows = [
        (f"`{_cell(item.name)}`", item.format, item.rows, item.revision or "", f"`{item.sha256[:16]}…`")
        for item in manifest.data
    ]
    table = _table(("source", "format", "rows", "revision", "sha256 of the content"), rows)
    totals = manifest.ledger.get("total")
    counts = ""
    if isinstance(totals, dict):
        lines = [(str(key).replace("_", " "), f"{value:,}") for key, value in totals.items() if isinstance(value, int)]
        intro = "Every row and token that was read (`ledger.json` has the whole account):"
        counts = f"\n\n{intro}\n\n{_table(('', 'total'), lines)}"
    return f"## Trained on\n\n{table}{counts}\n\n{_again(commands['data'])}"


def replan_words(replan: ReplanRecord) -> tuple[str, object]:
    """What changed from a step on, and why."""
    where = f"from step {replan.step} on" if replan.step else "before the first step"
    if replan.micro_batch_size is not None:
        return where, f"{replan.micro_batch_size} × {replan.accumulation} ({replan.reason})"
    return where, f"{replan.steps:,} steps at {replan.step_s:.3g} s each fit into the time"


def _training(manifest: Manifest, recipe: Recipe, config: Mapping[str, Any], commands: Mapping[str, str]) -> str:
    training = manifest.training
    facts: list[tuple[str, object]] = [
        ("method", training.method),
        ("rank, alpha", f"{config['r']}, {config['lora_alpha']}"),
        ("target modules", ", ".join(config["target_modules"])),
        ("trainable parameters", training.trainable_parameters),
        ("steps", training.steps),
        ("batch", f"{training.batch_size} sequences ({training.micro_batch_size} × {training.accumulation})"),
        *(replan_words(replan) for replan in training.replans),
        ("time given", training.budget),
        ("longest sequence", f"{training.max_length} tokens"),
        ("learning rate", f"{training.learning_rate:g}, {training.schedule}"),
        ("optimizer", training.optimizer),
        ("tokens", training.tokens),
        ("tokens with a loss", training.trained_tokens),
        ("final training loss", None if training.final_loss is None else f"{training.final_loss:.4g}"),
        (
            "time",
            None
            if training.seconds is None
            else f"{training.seconds:,.0f} s on {training.device or 'an unknown device'}",
        ),
        ("loss on", recipe.loss_on),
        ("seed", manifest.seed),
        ("libraries", ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())),
    ]
    rows = [(name, f"{value:,}" if isinstance(value, int) else value) for name, value in facts if value is not None]
    table = _table(("setting", "value"), rows)
    intro = "`recipe.yaml` holds every setting; time and memory depend on the machine."
    return f"## Training\n\n{intro}\n\n{table}\n\n{_again(commands['training'])}\n\n![loss](loss.png)"


def _verification(command: str) -> str:
    return (
        "## Verified\n\n`manifest.json` has the sha256 of every file and the fingerprint of the base; "
        "`test_vectors.json` has log-probabilities of base and adapter, which\n\n```\n"
        f"{command}\n"
        "```\n\nreplays on your machine: it shows that base, chat template and adapter really loaded, at the scale of "
        "training."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(str(value)) for value in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _fenced(text: str) -> str:
    """A text as a code block that it cannot end, whatever it holds."""
    shown = text if len(text) <= _MOST_SAMPLE else text[:_MOST_SAMPLE] + " …"
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")

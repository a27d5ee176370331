"""Facts of runs for tests of the report: an ordinary one, one of many tasks and steps, one full of hostile texts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_tune.adapter.folder import DataRecord, TrainingRecord
from lora_tune.evaluation.hard_rows import HardRow, HardRows
from lora_tune.evaluation.report_page import ReportFacts
from lora_tune.evaluation.scores import Comparison, RowScore, Score

NASTY = (
    "<script>document.title='hacked';window.hacked=1</script><img src=http://evil.example/x onerror=window.hacked=1>"
    "\"'>--></svg></title></style></textarea>{{ 7*7 }}{% raw %}<svg onload=window.hacked=1>"
    "<a href=javascript:window.hacked=1>x</a>&lt;b&gt;\x1b[31m\u202e\x00$\\frac{1$ \ud800"
)
"""What a row may hold: markup, ends of elements, template syntax, control and direction marks, half a surrogate."""
LONG = "w" * 5_000


def score(base: float, adapter: float, spread: float = 0.05, *, direction: Any = "higher", rows: int = 300) -> Score:
    """A score whose interval reaches `spread` to both sides of the difference."""
    difference = adapter - base
    p_value = 0.0004 if abs(difference) > spread else 0.31
    return Score(base, adapter, difference - spread, difference + spread, p_value, rows, direction)


def steps(count: int, *, every: int = 50) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: a falling loss with noise, a spike, and evaluations."""
    draw = random.Random(1)
    lines: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        loss = 0.4 + 3 * math.exp(-4 * step / count) + draw.gauss(0, 0.12) + (4 if step == count // 3 else 0)
        rate = 2e-4 * 0.5 * (1 + math.cos(math.pi * step / count))
        lines.append(
            {"step": step, "epoch": step / count, "loss": loss, "grad_norm": abs(draw.gauss(1, 0.4)),
             "learning_rate": rate, "tokens": draw.randint(1800, 2048), "trained_tokens": 600,
             "step_s": draw.uniform(0.4, 0.6),
             "gib": 5.2 + 0.3 * (step > count // 2)}
        )  # fmt: skip
        if step % every == 0:
            lines.append({"step": step, "epoch": step / count, "eval": {"loss": 0.6 + 2 * math.exp(-4 * step / count)}})
    return lines


def row(number: int, *, task: str = "", template: str = "", text: str | None = None) -> RowScore:
    """A held-out row; every third answer is right."""
    right = number % 3 == 0
    reference = text or f"The answer to question {number} is the quiet grey house by the long river."
    adapter = reference if right else reference.replace("quiet grey", "loud").replace("river", "road again")
    return RowScore(
        source="private/folder/held_out.jsonl",
        line=number,
        task=task,
        template=template,
        prompt=text or f"Read the text about house number {number} and say in one sentence where it stands.",
        reference=reference,
        base=text or "I am not sure what you mean. I am not sure what you mean. I am",
        adapter=text or adapter,
        metrics={"exact_match": (0.0, float(right)), "rouge_l": (0.1, 1.0 if right else 0.7), "loss": (3.1, 0.4)},
    )


def hard_rows(texts: Sequence[str]) -> HardRows:
    """A hard row for each text, and 900 easy ones."""
    draw = random.Random(2)
    losses = sorted((abs(draw.gauss(0.3, 0.25)) for _ in range(900)), reverse=True)
    hard = tuple(
        HardRow(f"train.jsonl:{17 * n + 3}", 6.5 - 0.2 * n, 8.0 - 0.1 * n, 4 + n, text, text[:80])
        for n, text in enumerate(texts)
    )
    return HardRows(hard, (*(row.adapter for row in hard), *losses), 12_000, 3.7)


def source(name: str, rows: int) -> dict[str, Any]:
    """One source of a ledger."""
    return {
        "name": name, "format": "alpaca", "why": "named in the recipe",
        "rows": {"read": rows, "kept": rows - 40, "held_out": 30, "left_by_max_rows": 0,
                 "dropped": {"empty answer": {"rows": 10, "first": f"{name}:88"}}, "in_an_epoch": rows - 40},
        "tokens": {"read": 90 * rows, "kept": 88 * rows, "trained": 30 * rows, "lost": 2 * rows, "dropped": 0},
        "notes": {"truncated": {"rows": 12, "first": f"{name}:7"}},
    }  # fmt: skip


def ledger(names: Sequence[str], text: str = "the quiet grey house by the long river") -> dict[str, Any]:
    """The account of some sources, with an overlap."""
    sources = [source(name, 4_000 + 100 * number) for number, name in enumerate(names)]
    read = sum(one["rows"]["read"] for one in sources)
    worst = [
        {"place": f"held_out.jsonl:{n}", "share": 0.9 / n, "trained": f"train.jsonl:{n}", "words": text} for n in (1, 2)
    ]
    return {
        "sources": sources,
        "total": {"read": read, "kept": read - 40 * len(names), "held_out": 30 * len(names), "left_by_max_rows": 0,
                  "dropped_rows": 10 * len(names), "tokens_read": 90 * read, "tokens_trained": 30 * read,
                  "tokens_lost": 2 * read},
        "packing": None,
        "warnings": [f"train.jsonl:7: 12 of 4,000 rows are cut to max_length; {text}"],
        "overlap": {"passage": 13, "rows": 300, "trained": read, "touched": 9, "mostly": 1, "common": 4,
                    "worst": worst},
    }  # fmt: skip


TRAINING = TrainingRecord(
    method="lora", steps=400, epochs=2.0, rows=3960, tokens=768_000, trained_tokens=240_000, seconds=4_271.3,
    final_loss=0.4123, batch_size=16, micro_batch_size=4, accumulation=4, max_length=2048, learning_rate=2e-4,
    optimizer="adamw", schedule="cosine", trainable_parameters=40_370_176, peak_gib=5.53, device="NVIDIA L4",
)  # fmt: skip


def ordinary() -> ReportFacts:
    """A run of 400 steps with two bounded metrics and the loss, 60 rows scored."""
    scores = {
        "loss": score(3.1, 0.42, 0.1, direction="lower"),
        "exact_match": score(0.02, 0.64),
        "rouge_l": score(0.21, 0.79),
        "stop_rate": score(0.91, 0.93),
        "repetition": score(0.1, 0.3, direction="lower"),
    }
    return ReportFacts(
        name="support_mails",
        tool="lora_tune 0.2.0",
        base="Qwen/Qwen2.5-7B at revision d149729398750b98c0af14eb82c78cfe92750796",
        held="nf4 with double quantization, computing in bfloat16",
        training=TRAINING,
        data=(DataRecord(name="train.jsonl", format="alpaca", sha256="ab" * 32, rows=4000),),
        ledger=ledger(["train.jsonl"]),
        comparison=Comparison(
            scores=scores,
            samples=(),
            max_new_tokens=128,
            stopped={"base": 0.31, "adapter": 0.98},
            rows=tuple(row(number) for number in range(1, 61)),
        ),
        steps=steps(400),
        recipe="base: {name: Qwen/Qwen2.5-7B}\ndata: [{source: train.jsonl}]\noutput: support_mails\n",
        libraries={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        seed=42,
        hard=hard_rows([f"Which house stands by the river, mail {number}?" for number in range(20)]),
        commands={
            "scores": "lora-tune eval path/to/this/folder --data held_out.jsonl",
            "data": "lora-tune preview recipe.yaml --json",
            "training": "lora-tune run recipe.yaml",
        },
    )


def many(tasks: int = 60, count: int = 30_000) -> ReportFacts:
    """A long run over many tasks with several templates each."""
    names = [f"super_glue/task number {number} with a long name" for number in range(tasks)]
    by_task = {
        name: {"exact_match": score(0.2, 0.2 + (n % 7 - 2) / 10), "rouge_l": score(0.3, 0.5)}
        for n, name in enumerate(names)
    }
    by_template = {
        name: {f"template {t}": {"exact_match": score(0.2 + 0.02 * t, 0.3 + 0.05 * t * (n % 3))} for t in range(5)}
        for n, name in enumerate(names)
    }
    rows = [
        row(number, task=names[number % tasks], template=f"template {number % 5}") for number in range(1, 8 * tasks + 1)
    ]
    facts = ordinary()
    return replace(
        facts,
        ledger=ledger([f"{name}.jsonl" for name in names]),
        comparison=replace(facts.comparison, tasks=by_task, rows=tuple(rows), templates=by_template),
        steps=steps(count, every=40),
        energy_wh=123.4,
    )


def hostile() -> ReportFacts:
    """Every text that comes from a row, a file's name, a recipe or an answer is hostile, or very long."""
    facts = ordinary()
    rows = tuple(row(n, task=NASTY, template=f"{NASTY}{n}", text=NASTY if n % 2 else LONG) for n in range(1, 31))
    wrong = {"rows": 3, "first": NASTY}
    account = ledger([NASTY, LONG], NASTY)
    account["sources"][0]["notes"] = {NASTY: wrong, LONG: wrong}
    return replace(
        facts,
        name=NASTY,
        base=NASTY,
        held=LONG,
        training=TRAINING.model_copy(update={"device": NASTY}),
        data=(DataRecord(name=NASTY, format="alpaca", sha256="ab" * 32, rows=4000, revision=LONG),),
        ledger=account,
        comparison=replace(
            facts.comparison,
            scores={NASTY: score(0.1, 0.2), LONG: score(3.0, 1.0, direction="lower")},
            tasks={NASTY: {NASTY: score(0.1, 0.2)}, LONG: {NASTY: score(0.2, 0.1)}},
            rows=rows,
            templates={NASTY: {f"{NASTY}{n}": {NASTY: score(0.1, 0.1 * n)} for n in range(4)}},
        ),
        recipe=NASTY + LONG,
        libraries={NASTY: LONG},
        hard=hard_rows([NASTY, LONG]),
        commands=dict.fromkeys(("scores", "data", "training"), f"{NASTY} {LONG}"),
    )

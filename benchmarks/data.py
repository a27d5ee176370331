"""How fast data becomes packed rows, here and through TRL's own path, in one run on the same rows.

    python -m benchmarks.data --tokenizer FOLDER --data FILE [--rows 10000] [--check-rows 50000] [--json] [--write]

`--data` is a file of alpaca rows, resampled to `--rows` (each with its number, so that no two are equal);
`--tokenizer` a folder with a tokenizer of the Qwen2.5 family. Both sides use TRL's copy of the Qwen2.5 template,
which it can train on. Measured are

    check   read_conversations: parse, schema, roles, exact duplicates, split (no tokenizer)
    ours    read_conversations and encode: file to packed rows, no cache; and again, with the cache
    trl     load_dataset, the rows as messages, SFTTrainer's preparation (assistant_only_loss, bfd packing), cache off

Of both sides 8 rows are prepared first, for what is imported and built once, then 8 others (`fixed_s`), whose time is
taken off: what is left is the rows'. Each part runs in a process of its own, on `--threads` threads, in `--rounds`
rounds of turns; medians count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions

MAX_LENGTH = 2048
LIBRARIES = ("trl", "datasets", "transformers", "tokenizers", "pyarrow")
ROOT = Path(__file__).resolve().parent.parent


def resampled(source: Path, target: Path, *, rows: int) -> Path:
    """`rows` alpaca rows as JSONL, in turn from `source` (a JSON array), each instruction with its number."""
    given = json.loads(source.read_text(encoding="utf-8"))
    with target.open("w", encoding="utf-8") as file:
        for i in range(rows):
            row = given[i % len(given)]
            file.write(json.dumps({**row, "instruction": f"{i}: {row['instruction']}"}, ensure_ascii=False) + "\n")
    return target


def template() -> str:
    """TRL's copy of the Qwen2.5 chat template."""
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")


def check(data: Path, tokenizer: Path) -> dict[str, Any]:
    """Seconds of CPU and of the clock for read_conversations."""
    from lora_tune.data.checking import read_conversations
    from lora_tune.recipe import DataSource

    clock, cpu = time.perf_counter(), time.process_time()
    found = read_conversations([DataSource(source=str(data))], hold_out="2%", seed=1)
    return {
        "rows": len(found.train) + len(found.held_out),
        "megabytes": round(data.stat().st_size / 1e6, 1),
        "s": time.perf_counter() - clock,
        "cpu_s": time.process_time() - cpu,
    }


def ours(data: Path, tokenizer: Path) -> dict[str, Any]:
    """Seconds from the file to packed rows, without and with the cache."""
    from transformers import AutoTokenizer

    from lora_tune.data.chat_template import load_chat_template
    from lora_tune.data.pipeline import encode, read_conversations
    from lora_tune.recipe import DataSource, Limits, Train

    chat = load_chat_template(AutoTokenizer.from_pretrained(tokenizer), template=template())
    facts: dict[str, Any] = {}
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    first, others = data.with_name("first.jsonl"), data.with_name("others.jsonl")
    first.write_text("".join(lines[:8]), encoding="utf-8")
    others.write_text("".join(lines[8:16]), encoding="utf-8")
    for name, path in (("start_", first), ("fixed_", others), ("", data), ("cached_", data)):
        clock, cpu = time.perf_counter(), time.process_time()
        conversations = read_conversations([DataSource(source=str(path))], hold_out=0, seed=1)
        train = Train(max_length=MAX_LENGTH)
        found = encode(conversations, chat, loss_on="assistant", train=train, limits=Limits(), seed=1)
        facts |= {f"{name}s": time.perf_counter() - clock, f"{name}cpu_s": time.process_time() - cpu}
    facts["s"], facts["cpu_s"] = facts["s"] - facts["fixed_s"], facts["cpu_s"] - facts["fixed_cpu_s"]
    ledger = found.ledger
    assert ledger.packing is not None
    packing = {"sequences": ledger.packing.sequences, "efficiency": round(ledger.packing.efficiency, 4)}
    return {**facts, "tokens": ledger.packing.tokens, "trained": ledger.total("tokens_trained"), **packing}


def trl(data: Path, tokenizer: Path) -> dict[str, Any]:
    """Seconds that SFTTrainer's own preparation takes for the same rows as messages."""
    import datasets
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.eos_token, words.pad_token, words.chat_template = "<|im_end|>", "<|endoftext|>", template()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).to(torch.bfloat16)

    def prepared(rows: int | None) -> Any:
        table = datasets.load_dataset("json", data_files=str(data), split="train")
        table = table if rows is None else table.select(range(rows))
        messages = table.map(_as_messages, remove_columns=table.column_names)
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder,
                max_length=MAX_LENGTH,
                packing=True,
                assistant_only_loss=True,
                report_to=[],
                use_cpu=True,
                bf16=False,
            )
            return SFTTrainer(model, args=config, train_dataset=messages, processing_class=words).train_dataset

    prepared(8)
    clock, cpu = time.perf_counter(), time.process_time()
    prepared(8)
    fixed, fixed_cpu = time.perf_counter() - clock, time.process_time() - cpu
    clock, cpu = time.perf_counter(), time.process_time()
    rows = prepared(None)
    s, cpu_s = time.perf_counter() - clock - fixed, time.process_time() - cpu - fixed_cpu
    tokens = sum(map(len, rows["input_ids"]))
    return {
        "fixed_s": fixed,
        "fixed_cpu_s": fixed_cpu,
        "s": s,
        "cpu_s": cpu_s,
        "tokens": tokens,
        "sequences": len(rows),
        "efficiency": round(tokens / (len(rows) * MAX_LENGTH), 4),
    }


def _as_messages(row: dict[str, str]) -> dict[str, Any]:
    user = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]}


PARTS = {"check": check, "ours": ours, "trl": trl}


def measured(part: str, data: Path, tokenizer: Path, *, threads: int) -> dict[str, Any]:
    """One part in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS")
        settings = {**dict.fromkeys(names, str(threads)), "LORA_TUNE_CACHE": cache, "HF_DATASETS_CACHE": cache}
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONPATH": str(ROOT)}
        environment = {**os.environ, **settings, **offline}
        command = [sys.executable, "-m", "benchmarks.data", "--part", part]
        command += ["--data", str(data), "--tokenizer", str(tokenizer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{part} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number over the rounds."""
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def row_of(tool: str, found: dict[str, Any], rows: int) -> dict[str, Any]:
    """A line of the result."""
    return {"tool": tool, "rows_per_s": round(rows / found["s"]), "rows_per_cpu_s": round(rows / found["cpu_s"]),
            **{name: round(value, 4) for name, value in found.items()}}  # fmt: skip


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """All parts in turns; `{machine, versions, rows, …}`."""
    result: dict[str, Any] = {"machine": machine(), "versions": versions(*LIBRARIES), "threads": given.threads}
    with tempfile.TemporaryDirectory() as folder:
        checked = resampled(given.data, Path(folder) / "check.jsonl", rows=given.check_rows)
        data = resampled(given.data, Path(folder) / "rows.jsonl", rows=given.rows)
        check_found = measured("check", checked, given.tokenizer, threads=given.threads)
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
        for _ in range(given.rounds):
            for part in found:
                found[part].append(measured(part, data, given.tokenizer, threads=given.threads))
    both = {part: middle(rounds) for part, rounds in found.items()}
    return result | {
        "rounds": given.rounds,
        "data": given.data.name,
        "tokenizer": given.tokenizer.name,
        "rows_of_data": given.rows,
        "rows": [row_of("lora_tune", both["ours"], given.rows), row_of("trl", both["trl"], given.rows)],
        "check": row_of("lora_tune", check_found, given.check_rows),
        "times_faster": round(both["trl"]["s"] / both["ours"]["s"], 2),
        "times_less_cpu": round(both["trl"]["cpu_s"] / both["ours"]["cpu_s"], 2),
    }


def main() -> None:
    """Measure all parts, or print one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--check-rows", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="keep it as benchmarks/results/data.json")
    given = parser.parse_args()
    if given.part:
        print(json.dumps(PARTS[given.part](given.data, given.tokenizer)))
        return
    result = compare(given)
    text = json.dumps(result, indent=1)
    if given.write:
        (RESULTS / "data.json").write_text(text + "\n", encoding="utf-8")
    if given.json:
        print(text)
        return
    checked = result["check"]
    print(f"check   {given.check_rows:,} rows: {checked['s']:.1f} s ({checked['cpu_s']:.1f} s of CPU)")
    for row in result["rows"]:
        took = f"{row['tokens']:,} tokens: {row['s']:.1f} s ({row['cpu_s']:.1f} s of CPU), {row['rows_per_s']:,} rows/s"
        print(f"{row['tool']:10} {took}, {row['sequences']:,} sequences, {row['efficiency']:.1%} full")
    print(f"ours, from the cache: {result['rows'][0]['cached_s']:.1f} s")
    print(f"faster than TRL: {result['times_faster']:.2f} times ({result['times_less_cpu']:.2f} times less CPU)")


if __name__ == "__main__":
    main()

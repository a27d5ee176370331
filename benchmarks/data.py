"""How fast data becomes packed rows, here and through TRL's own path, in one run on the same rows.

    python benchmarks/data.py --tokenizer FOLDER --data FILE [--rows 10000] [--check-rows 50000] [--json]

`--data` is a file of alpaca rows, resampled to `--rows` (each with its number, so that no two are equal);
`--tokenizer` a folder with a tokenizer of the Qwen2.5 family. Both sides use TRL's copy of the Qwen2.5 template,
which it can train on. Measured are

    check   read_conversations: parse, schema, roles, exact duplicates, split (no tokenizer)
    ours    read_conversations and encode: file to packed rows, no cache; and again, with the cache
    trl     load_dataset, the rows as messages, SFTTrainer's preparation (assistant_only_loss, bfd packing), cache off,
            less the time that the same trainer takes for 8 rows

each in a process of its own, on `--threads` threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MAX_LENGTH = 2048


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
    few = data.with_name("few.jsonl")  # imports and start-up first, as for TRL
    few.write_text("".join(data.open(encoding="utf-8").readlines()[:8]), encoding="utf-8")
    for name, path in (("start_", few), ("", data), ("cached_", data)):
        clock, cpu = time.perf_counter(), time.process_time()
        conversations = read_conversations([DataSource(source=str(path))], hold_out=0, seed=1)
        train = Train(max_length=MAX_LENGTH)
        found = encode(conversations, chat, loss_on="assistant", train=train, limits=Limits(), seed=1)
        facts |= {f"{name}s": time.perf_counter() - clock, f"{name}cpu_s": time.process_time() - cpu}
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

    clock, cpu = time.perf_counter(), time.process_time()
    prepared(8)
    fixed, fixed_cpu = time.perf_counter() - clock, time.process_time() - cpu
    clock, cpu = time.perf_counter(), time.process_time()
    rows = prepared(None)
    s, cpu_s = time.perf_counter() - clock - fixed, time.process_time() - cpu - fixed_cpu
    tokens = sum(map(len, rows["input_ids"]))
    return {
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
        environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, __file__, "--part", part, "--data", str(data), "--tokenizer", str(tokenizer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{part} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all parts, or print one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--check-rows", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.part:
        print(json.dumps(PARTS[given.part](given.data, given.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as folder:
        checked = resampled(given.data, Path(folder) / "check.jsonl", rows=given.check_rows)
        data = resampled(given.data, Path(folder) / "rows.jsonl", rows=given.rows)
        facts: dict[str, Any] = {"check": measured("check", checked, given.tokenizer, threads=given.threads)}
        for part in ("ours", "trl"):
            facts[part] = measured(part, data, given.tokenizer, threads=given.threads)
    names = ("trl", "datasets", "transformers", "tokenizers", "pyarrow")
    facts |= {
        "rows": given.rows,
        "threads": given.threads,
        "times_faster": facts["trl"]["s"] / facts["ours"]["s"],
        "times_less_cpu": facts["trl"]["cpu_s"] / facts["ours"]["cpu_s"],
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in names},
    }
    if given.json:
        print(json.dumps(facts))
        return
    print(
        f"check   {facts['check']['rows']:,} rows: {facts['check']['s']:.1f} s ({facts['check']['cpu_s']:.1f} s of CPU)"
    )
    for part in ("ours", "trl"):
        found = facts[part]
        took = f"{given.rows:,} rows, {found['tokens']:,} tokens: {found['s']:.1f} s ({found['cpu_s']:.1f} s of CPU)"
        print(f"{part:6}  {took}, {found['sequences']:,} sequences, {found['efficiency']:.1%} full")
    print(f"ours, from the cache: {facts['ours']['cached_s']:.1f} s")
    print(f"faster than TRL: {facts['times_faster']:.2f} times ({facts['times_less_cpu']:.2f} times less CPU)")


if __name__ == "__main__":
    main()

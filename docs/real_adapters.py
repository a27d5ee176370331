"""Writes real_adapters.md: what `adapters inspect` and `verify` say of adapters that strangers published.

    LORA_TUNE_CORPUS=... python docs/real_adapters.py

The corpus holds eight whole folders and 34 configurations, as they were on the hub; none was made with this tool.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

TARGET = Path(__file__).with_name("real_adapters.md")
HEAD = """# Adapters that strangers published

Made by `python docs/real_adapters.py` from folders and configurations as they were found on the hub; a test compares.
"""
_FOLDERS = """
## Folders

`lora-tune adapters inspect FOLDER` and `verify FOLDER --quick --for all`, without their bases at hand.

| folder | verdict | what it is | largest update per weight (RMS) | vLLM | SGLang | llama.cpp | Ollama | MLX | LoRAX |
|---|---|---|---|---|---|---|---|---|---|
"""
_CONFIGS = """
## Configurations

What the checks say of `adapter_config.json` alone: {accepted} of {count} describe a LoRA or DoRA adapter of a causal
language model that can be loaded; all others are refused by name, before anything of them is loaded.

| configuration | verdict |
|---|---|
"""


def document(corpus: Path) -> str:
    """The text of real_adapters.md."""
    folders = "".join(map(_folder_line, sorted((corpus / "data" / "adapters").iterdir())))
    files = sorted((corpus / "data" / "adapter_configs").glob("*.json"))
    verdicts = {file.stem: _config_verdict(file) for file in files}
    accepted = sum(verdict.startswith("accepted") for verdict in verdicts.values())
    configs = "".join(f"| {name} | {verdict} |\n" for name, verdict in verdicts.items())
    return HEAD + _FOLDERS + folders + _CONFIGS.format(accepted=accepted, count=len(files)) + configs


def _folder_line(folder: Path) -> str:
    from lora_tune.adapter.compat import ENGINES, SIGNS, judge
    from lora_tune.adapter.describe import updates
    from lora_tune.adapter.folder import WEIGHTS
    from lora_tune.adapter.verify import engine_traits, verify_folder

    report = verify_folder(folder, depth="quick")
    if report.errors:
        error = report.errors[0]
        more = f" (and {len(report.errors) - 1} more)" if len(report.errors) > 1 else ""
        return (
            f"| {folder.name} | refused: {_cell(_named(error.reason, error.key))}{more} | – | – |" + " – |" * 6 + "\n"
        )
    facts, subject = report.facts, report.subject
    warned = [problem.reason for problem in report.problems if problem.severity == "warning"]
    verdict = "accepted" + (f", warned: {_cell(warned[0])}" if warned else "")
    targets = facts["targets"] if isinstance(facts["targets"], str) else ", ".join(sorted(facts["targets"]))
    what = (
        f"{facts['method']}, rank {facts['rank']}, alpha {facts['alpha']:g}, {facts['parameters']:,} parameters in "
        f"{', '.join(facts['dtype'])}, on {targets}; base {facts['base']}"
    )
    found = updates(folder / WEIGHTS, subject.header, subject.known_settings())
    marks = [SIGNS[judge(engine_traits(subject), engine).mark] for engine in ENGINES]
    largest = max(update.rms for update in found)
    return f"| {folder.name} | {verdict} | {_cell(what)} | {largest:.1e} | {' | '.join(marks)} |\n"


def _config_verdict(file: Path) -> str:
    from lora_tune.adapter.lora_config import check_config, read_settings

    content = json.loads(file.read_text(encoding="utf-8"))
    problems = check_config(content)
    if problems:
        rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return f"refused: {_cell(_named(problems[0].reason, problems[0].key))}{rest}"
    settings = read_settings(content)
    kind = "DoRA" if settings.dora else "rsLoRA" if settings.rslora else "LoRA"
    base = settings.base_name or "no base named"
    return f"accepted: {kind}, rank {settings.rank}, alpha {settings.alpha:g}; {_cell(base)}"


def _named(reason: str, key: str | None) -> str:
    return reason if key is None or key in reason else f"`{key}` {reason}"


def _cell(text: str) -> str:
    """One cell of a table; a stranger's path is cut to its last part."""
    shown = " ".join(text.replace("|", "\\|").split())
    return " ".join(_without_path(word) for word in shown.split(" "))


def _without_path(word: str) -> str:
    if word.startswith(("/", "~")) or ":\\" in word or word.count("/") > 1:
        return "…/" + word.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return word


if __name__ == "__main__":
    place = os.environ.get("LORA_TUNE_CORPUS")
    if not place:
        sys.exit("LORA_TUNE_CORPUS must name the corpus")
    TARGET.write_text(document(Path(place)), encoding="utf-8")

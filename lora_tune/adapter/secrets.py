"""What must not leave this machine with a folder: keys and tokens, and local paths, in any of its text files.

Patterns: the documented prefixes of access tokens (Hugging Face, OpenAI, GitHub, AWS, Google, Slack), keys in an
assignment, private key blocks; the values of this process's own secret environment variables; home folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lora_tune.adapter.folder import FILES, WEIGHTS
from lora_tune.errors import Problem

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)
SECRET_LENGTH = 12
"""Shorter values of such variables (`1`, `true`) stand in many a text."""
_TOKENS: dict[str, str] = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}\b",
    "an OpenAI key": r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}\b",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{20,}\b",
    "a private key": r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
    "an assigned key": r"(?i)\b(?:wandb_api_key|api_key|hub_token|auth_token)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9_-]{24,}",
}
_PATH = re.compile(r"(?:/(?:home|Users|root)/|\b[A-Za-z]:\\\\?Users\\\\?)[^\s\"'`<>|]+")
_PATHS_MATTER = ("adapter_config.json", "tokenizer_config.json", "recipe.yaml", "manifest.json", "README.md")
_BINARY = (WEIGHTS, "loss.png", "tokenizer.model")
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # made of fragments of anything


def secrets_in(folder: Path) -> Iterator[Problem]:
    """Every secret or local path in the documented text files of a folder: where it stands, never what it is."""
    for name in FILES:
        path = folder / name
        if name in _BINARY or name in _VOCABULARY or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            for kind in kinds_in(line, paths="matter" if name in _PATHS_MATTER else "may stand"):
                yield Problem(f"holds {kind}", "remove it, and write the folder again", str(path), line=number)


def kinds_in(line: str, *, paths: Literal["matter", "may stand"] = "matter") -> list[str]:
    """What of a line must not leave this machine, in words; never the thing itself."""
    mine = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SECRET_LENGTH}
    found = [kind for kind, pattern in _TOKENS.items() if re.search(pattern, line)]
    found += ["a secret of your environment"] if any(value in line for value in mine) else []
    found += ["a path of a local machine"] if paths == "matter" and _PATH.search(line) else []
    return found

"""The tokenizer of a base, loaded with checks against the ways in which it comes out silently broken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tune.errors import Problem, RecipeError, UsageError
from lora_tune.imports import quick_imports
from lora_tune.model.weights import is_lfs_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer needs the files of one of these; without, AutoTokenizer makes one of the special tokens alone, silently.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.txt",),
)
_TEXT_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
_PROBE = "The quick brown fox: 42 jumps.\nΑλφα"


def read_tokenizer(
    folder: Path, *, name: str, new_tokens: Sequence[str] = (), code: str = "refused"
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder and add `new_tokens` to it.

    `name` stands in messages. `code="trusted"` lets the folder's own Python code run.

    Raises:
        UsageError: vocabulary missing, a Git LFS pointer or damaged; encodes text to nothing.
        RecipeError: a new token is there already.
    """
    with quick_imports():
        from transformers import AutoTokenizer

    _check_files(folder, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=code == "trusted"
        )
        ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    except ImportError as error:
        raise UsageError(f"base {name!r}: its tokenizer needs a package: {_first_line(error)}", "install it") from error
    except Exception as error:  # the Rust tokenizers raise Exception itself, with no class of their own
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"base {name!r}: its tokenizer runs Python code from its repository, which is not supported",
                f"read that code; if you trust it, pass --trust-remote-code {name}",
            ) from error
        reason = f"{_first_line(error)} ({type(error).__name__})"
        raise UsageError(
            f"base {name!r}: its tokenizer cannot be loaded: {reason}", "copy or download the tokenizer files again"
        ) from error
    if len(ids) < 3 or all(token in tokenizer.all_special_ids for token in ids):
        raise UsageError(
            f"base {name!r}: its tokenizer of {len(tokenizer)} tokens encodes ordinary text to {len(ids)} tokens",
            "tokenizer.json is missing or damaged: copy or download it again",
        )
    _add(tokenizer, new_tokens)
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def _check_files(folder: Path, name: str) -> None:
    for file in _TEXT_FILES:
        path = folder / file
        if path.is_file() and is_lfs_pointer(path):
            raise UsageError(f"{path}: this is a Git LFS pointer, not the file", "run `git lfs pull` in that folder")
    tiktoken = any(folder.glob("*.tiktoken"))
    if not tiktoken and not any(all((folder / file).is_file() for file in files) for files in _VOCABULARIES):
        raise UsageError(
            f"base {name!r}: no tokenizer there",
            "a base needs tokenizer.json (or vocab.json with merges.txt, or tokenizer.model)",
        )


def _add(tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[str]) -> None:
    vocabulary = tokenizer.get_vocab()
    known = [token for token in new_tokens if token in vocabulary]
    if known:
        raise RecipeError(
            Problem(f"the tokenizer has these tokens already, got {known}", "leave them out", key="lora.new_tokens")
        )
    if new_tokens:
        tokenizer.add_tokens(list(new_tokens), special_tokens=False)

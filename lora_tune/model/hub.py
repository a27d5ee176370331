"""Downloads of a base from the Hugging Face hub, with one clear line for each way in which they fail (cold)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_tune.errors import UsageError

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "*.tiktoken", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*",
)  # fmt: skip
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
CODE_FILES = ("*.py",)
PLAN_FILES = ("config.json", "model.safetensors.index.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def is_repository_id(name: str) -> bool:
    """Whether the name can be that of a hub repository: `owner/name`, or `name` for the oldest ones."""
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name and "--" not in name


def download(name: str, *, revision: str | None, patterns: tuple[str, ...], what: str = "base") -> tuple[Path, str]:
    """Fetch the matching files of a repository (HF_TOKEN, HF_HOME and HF_HUB_OFFLINE hold); return folder and commit.

    Offline, or where the hub does not answer, the copy in the local cache is used. `what` is its name in messages.

    Raises:
        UsageError: gated, private, missing, unknown revision, offline without a copy, hub out of reach.
    """
    from huggingface_hub import snapshot_download

    where = f"{what} {name!r}" + (f" at revision {revision!r}" if revision else "")
    with explained(where, name):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    return folder, commit_of(folder) or ""


@contextmanager
def explained(where: str, name: str) -> Iterator[None]:
    """Turn every way in which the hub refuses the repository `name` into one line that begins with `where`.

    Raises: UsageError.
    """
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, as the hub has it

    try:
        yield
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{where}: the repository is gated and this account has no access",
            f"accept its terms on the hub (huggingface.co/{name}), then set HF_TOKEN to a token of that account",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{where}: no such branch, tag or commit", "look at the repository's commits") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{where}: no such repository on the hub, and no such folder; or it is private",
            "check the spelling; for a private one set HF_TOKEN to a token that may read it",
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError) as error:
        raise UsageError(
            f"{where}: not in the local cache, and the hub cannot be reached (offline)",
            "unset HF_HUB_OFFLINE, check the network, or name a local folder",
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{where}: neither a hub repository (owner/name) nor a folder", "check the name") from error
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{where}: the hub refused: {reason}", "check network, disk space and HF_TOKEN") from error


def cached(name: str, *, revision: str | None) -> Path | None:
    """The snapshot folder of a repository in the local cache, where it holds config.json; no network call."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    try:
        commit = wanted if _COMMIT.fullmatch(wanted) else (root / "refs" / wanted).read_text().strip()
    except (OSError, ValueError):
        return None
    folder = root / "snapshots" / commit
    return folder if _COMMIT.fullmatch(commit) and (folder / "config.json").is_file() else None


def commit_of(folder: Path) -> str | None:
    """The commit of a snapshot folder in a hub cache (`…/models--owner--name/snapshots/<commit>`), else None."""
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if cached and _COMMIT.fullmatch(folder.name) else None


def repository_of(folder: Path) -> str | None:
    """The repository of a snapshot folder in a hub cache, else None."""
    if commit_of(folder) is None:
        return None
    return "/".join(folder.parent.parent.name.removeprefix("models--").split("--", 1))

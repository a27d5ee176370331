"""An adapter folder that is to be used: its base, found and checked, and its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_tune.adapter.folder import MANIFEST, read_manifest
from lora_tune.adapter.verify import recorded_base, verify_folder
from lora_tune.errors import CheckFailed
from lora_tune.model.source import BaseSource, find_base
from lora_tune.recipe import Base

if TYPE_CHECKING:
    from lora_tune.data.chat_template import ChatTemplate


def base_at_hand(
    folder: Path, *, name: str | None = None, trust_remote_code: str | None = None
) -> tuple[BaseSource, Base]:
    """The base of an adapter, held as in training; `name` is where it lies, and is needed for a local one alone.

    Raises: CheckFailed where the folder fails a quick check or belongs to another base, UsageError where the base
    cannot be found.
    """
    is_local = read_manifest(folder).base.kind == "local"
    base = recorded_base(folder, name=name if is_local or (name and Path(name).is_dir()) else None)
    report = verify_folder(folder, base=base, depth="quick", trust_remote_code=trust_remote_code)
    if report.errors:
        raise CheckFailed(report.errors)
    return find_base(base, trust_remote_code=trust_remote_code), base


def words_of(folder: Path, *, base: Path | None) -> ChatTemplate | None:
    """The words of training: the folder's own tokenizer and template; a stranger's folder without takes its base's.

    None where there is no tokenizer in either. Raises: CheckFailed.
    """
    from lora_tune.adapter.words import TOKENIZER, template_text
    from lora_tune.data.chat_template import load_chat_template
    from lora_tune.model.tokenizer import read_tokenizer

    has_own = (folder / TOKENIZER).exists() or (folder / "tokenizer_config.json").exists()
    place = folder if has_own else base
    if place is None:
        return None
    return load_chat_template(read_tokenizer(place, name=place.name), template=template_text(folder))


def held_for(folder: Path, name: str) -> Base:
    """The base called `name` as the folder's manifest says it was held; as it is stored for a stranger's folder.

    Raises: CheckFailed where the manifest is damaged.
    """
    if (folder / MANIFEST).exists():
        return recorded_base(folder, name=name)
    return Base(name=name, quantize="none")


def chat_of_folder(folder: Path) -> ChatTemplate:
    """The chat template of a folder, with its tokenizer. Raises: CheckFailed."""
    from lora_tune.data.chat_template import load_chat_template
    from lora_tune.model.tokenizer import read_tokenizer

    return load_chat_template(read_tokenizer(folder, name=folder.name))

"""One export: what every target is given, and what it gives back. No torch.

A target is one function `(job, scratch) -> Written` and one line in `export_targets.TARGETS`. It writes into an empty
folder; the verb then compares its words with training and only after that moves the folder to its place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_tune.adapter.parity import Render
from lora_tune.errors import CheckFailed, Problem

if TYPE_CHECKING:
    from lora_tune.adapter.checks import Subject
    from lora_tune.data.chat_template import ChatTemplate
    from lora_tune.model.source import BaseSource
    from lora_tune.recipe import Base

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Job:
    """A checked adapter folder on its way out.

    `chat` renders as training did; it is None for a stranger's folder without a tokenizer whose base is not at hand.
    `source` and `base` are the base where it lies, and how training held it; None where it is not at hand.
    """

    folder: Path
    subject: Subject
    """The folder as the checks have read it: `manifest`, `known_settings()`, `header`."""
    dtype: Dtype
    chat: ChatTemplate | None = None
    source: BaseSource | None = None
    base: Base | None = None
    max_kl: float = 0.1
    """The divergence in nats beyond which a merged model is refused."""
    data: Path | None = None

    def known_chat(self) -> ChatTemplate:
        """The words of training. Raises: CheckFailed where they are not known."""
        if self.chat is None:
            reason = "holds no tokenizer, so that the words it is fed cannot be compared"
            raise CheckFailed(Problem(reason, "give its base with --base", str(self.folder)))
        return self.chat

    def known_base(self) -> tuple[BaseSource, Base]:
        """The base at hand. Raises: CheckFailed where there is none."""
        if self.source is None or self.base is None:
            raise CheckFailed(Problem("its base is not at hand", "give it with --base", str(self.folder)))
        return self.source, self.base


@dataclass(frozen=True, slots=True)
class Written:
    """What a target wrote: numbers for `--json`, how it renders and where it stops, and what to do with it.

    `render` is the target's own template engine on the files that were written (None: it has no words of its own, or
    those of training are not known); `how` are lines for people: commands that start it.
    """

    facts: Mapping[str, Any]
    render: Render | None = None
    stop_ids: Collection[int] = ()
    how: tuple[str, ...] = ()


OUTPUT = "@OUTPUT@"
"""Where the folder will lie, in a line of `how`; the verb puts the quoted path there. No shell needs it quoted."""

"""Lines typed into a terminal: editing, history over sessions, completion of commands, by prompt_toolkit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_tune.errors import UsageError

HISTORY = "chat_history"


def line_reader(commands: Sequence[str]) -> Callable[[str], str]:
    """A function from the words of a prompt to the line that is typed behind it.

    It raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C. Esc and then Enter begin a new line within the line.
    Raises: UsageError where prompt_toolkit is not installed.
    """
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.key_binding.key_processor import KeyPressEvent
    except ModuleNotFoundError:
        reason = "typing needs prompt_toolkit, which is not installed"
        raise UsageError(reason, "pip install 'lora_tune[chat]', or pipe lines in") from None
    keys = KeyBindings()

    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    keys.add("escape", "enter")(new_line)
    file = history_file()
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(file)) if file else InMemoryHistory(),
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        prompt_continuation="… ",
    )
    return session.prompt


def history_file() -> Path | None:
    """Where typed lines are kept, for nobody else to read; None where the disk refuses it."""
    import platformdirs

    path = Path(platformdirs.user_state_dir("lora_tune", appauthor=False)) / HISTORY
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return None
    return path

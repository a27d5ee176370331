"""`lora-tune VERB …`: the table of commands; only the chosen one is imported."""

from __future__ import annotations

import gc
import importlib
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from lora_tune import __version__
from lora_tune.errors import Problem
from lora_tune.terminal import print_json, print_problems, run_app

# verb: (module with `app: typer.Typer`, help in one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("lora_tune.run", "Train one adapter from one recipe."),
    "plan": ("lora_tune.plan", "Plan a run: will it fit, how long will it take, what should change."),
    "preview": ("lora_tune.preview", "Show the rows as they will be trained: tokens, loss mask, ledger."),
    "eval": ("lora_tune.eval", "Base against adapter on the same rows, with intervals."),
    "generate": ("lora_tune.generate", "Answer a file of prompts, in batches."),
    "chat": ("lora_tune.chat", "Talk to adapters and their base."),
    "serve": ("lora_tune.serve", "Serve adapters over one base, with OpenAI's API and a page."),
    "adapters": ("lora_tune.adapters", "Look at adapter folders and verify them."),
    "merge": ("lora_tune.merge", "Fold an adapter into its base and prove it."),
    "export": ("lora_tune.export", "Write an adapter in the layout of another engine."),
    "rehearse": ("lora_tune.rehearse", "Rehearse the whole journey of a recipe on a small model."),
    "doctor": ("lora_tune.doctor", "Look whether this machine is ready."),
    "launch": ("lora_tune.launch", "Files for cluster engines: training jobs, and replicas of vLLM."),
    "sweep": ("lora_tune.sweep", "Many runs of one recipe, and the best of them."),
    "recipe": ("lora_tune.recipes", "Check a recipe; print the JSON Schema of recipes."),
}
HELP = f"""lora-tune {__version__}: from one recipe to a proven LoRA adapter folder.

Usage: lora-tune VERB ...        the same as: python -m lora_tune VERB ...

{chr(10).join(f"  {verb:<10} {line}" for verb, (_, line) in COMMANDS.items())}

  VERB --help    its arguments
  --version      the version

Exit codes: 0 ok, 1 a check was refused, 2 usage or recipe, 3 content of data, 4 memory, disk or time, 128+N a signal.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; `arguments` without the program's name, by default the process's."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("--help", "-h", "help"):
        sys.stdout.write(HELP)
        return 0 if given else 2
    if given[0] in ("--version", "-V"):
        sys.stdout.write(f"lora-tune {__version__}\n")
        return 0
    verb, *rest = given
    if verb not in COMMANDS:
        nearest = get_close_matches(verb, COMMANDS, n=1, cutoff=0.4)
        fix = f"did you mean {nearest[0]}?" if nearest else f"the verbs are {', '.join(COMMANDS)}"
        problems = [Problem(f"no such command, got {verb!r}", fix)]
        if "--json" in rest:
            print_json({"exit_code": 2}, problems)
        else:
            print_problems(problems)
        return 2
    module, _ = COMMANDS[verb]
    return run_app(importlib.import_module(module).app, name=f"lora-tune {verb}", arguments=rest)


def entry() -> None:
    """The `lora-tune` command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while imports run, before and after: Ctrl-C without a traceback
    code = main()
    gc.freeze()  # or the interpreter walks all objects at its end: 1.5 s after torch, which a stopped run may not have
    sys.exit(code)

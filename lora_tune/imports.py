"""Imports that cost less: the garbage collector rests, and bitsandbytes comes when something of it is used.

PEFT imports bitsandbytes wherever it is installed, and that brings torch's compiler: about a second of CPU, which a run
with `base.quantize: none` has no use for.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_MANY = 100  # modules; fewer are no reason to freeze what lives
_LOCK = threading.RLock()


@contextmanager
def quick_imports(*later: str) -> Iterator[None]:
    """For heavy imports: the garbage collector rests, and what was imported it never looks at again.

    Imports make millions of objects and hardly any garbage; looking for it takes a fifth of their time. The modules
    `later` come when something of them is used.
    """
    was_on, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        for name in later:
            defer(name)
        yield
    finally:
        if len(sys.modules) - before > _MANY:
            gc.freeze()
        if was_on:
            gc.enable()


def defer(name: str) -> None:
    """Let `import NAME` bring a stand-in that becomes the module when something of it is used; no-op once it is there.

    `importlib.util.LazyLoader` would import at the first look at `__spec__`, by which others ask whether it is there.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    vars(module).pop("__path__", None)  # so that the import of a part of it imports the whole first
    module.__class__ = _Deferred
    sys.modules[name] = module


def is_in_use(name: str) -> bool:
    """Whether a module was imported, and not its stand-in alone."""
    module = sys.modules.get(name)
    return module is not None and not isinstance(module, _Deferred)


class _Deferred(ModuleType):
    """A module that is imported when one of its names is read."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__path__", "__version__", "__all__"):
            raise AttributeError(name)  # questions that are asked of every module
        with _LOCK:
            if isinstance(self, _Deferred):  # no other thread was first
                spec: Any = self.__spec__
                self.__class__ = ModuleType  # type: ignore[assignment]
                if spec.submodule_search_locations is not None:
                    self.__path__ = spec.submodule_search_locations
                try:
                    spec.loader.exec_module(self)
                except BaseException:
                    sys.modules.pop(spec.name, None)
                    raise
        return getattr(self, name)

"""Facts about this machine that decide whether a training will work, gathered without torch and without network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import struct
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_tune.disk import free_bytes

GIB = 2**30
# What a training stands on; the other dependencies are checked with them, and named only where they are amiss.
STACK = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "huggingface_hub")
# Variables that change what happens; none of them holds a secret.
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT",
    "HF_HUB_ENABLE_HF_TRANSFER", "TRANSFORMERS_CACHE", "BNB_CUDA_VERSION", "LORA_TUNE_CACHE",
)  # fmt: skip
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MODES = {1: "exclusive", 2: "prohibited", 3: "exclusive"}  # NVML's compute modes that are not the default


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU, as its driver describes it."""

    name: str
    total_gib: float
    free_gib: float
    capability: tuple[int, int] | None = None
    mode: str = "default"


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that will be written: what for, where, GiB free there, whether writing is allowed."""

    what: str
    path: str
    free_gib: float
    access: Literal["writable", "refused"] = "writable"


@dataclass(frozen=True)
class Machine:
    """Everything that the checks look at; tests make one by hand.

    `packages`: installed version, or None. `ranges`: the versions that lora_tune takes. `torch_cuda`: the CUDA version
    that torch was built for, None for a CPU build; `torch_hip` that of ROCm. `bnb_cuda`: CUDA versions that
    bitsandbytes has a library for, such as "128". `driver` is that of NVIDIA, and `nvml` why it gives no answer.
    `token`: where a token for the hub comes from; never the token. `now` and `built`: the clock, and when the files of
    this package were written, seconds since 1970.
    """

    python: str = "3.11.0"
    bits: int = 64
    system: str = "Linux"
    packages: Mapping[str, str | None] = field(default_factory=dict)
    ranges: Mapping[str, str] = field(default_factory=dict)
    torch_cuda: str | None = None
    torch_hip: str | None = None
    bnb_cuda: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    nvml: str = ""
    cores: int = 2
    memory_gib: float = 16.0
    free_gib: float = 12.0
    places: tuple[Place, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    token: Literal["variable", "file", "none"] = "none"
    encoding: str = "utf-8"
    now: float = 0.0
    built: float = 0.0

    @property
    def is_offline(self) -> bool:
        """Whether the hub's libraries are told not to connect."""
        return any(is_set(self.environment, name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def is_set(environment: Mapping[str, str], name: str) -> bool:
    """Whether a switch is on, as the hub's libraries read it."""
    return environment.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE")


def look(output: Path) -> Machine:
    """The facts of this machine; `output` is where adapters would be written."""
    import psutil

    from lora_tune.model.memory import device_budget

    gpus, driver, nvml = _gpus()
    cuda, hip = _torch_build()
    device, free_gib = device_budget()
    memory = psutil.virtual_memory()
    packages, ranges = _packages()
    return Machine(
        python=platform.python_version(),
        bits=8 * struct.calcsize("P"),
        system=platform.system(),
        packages=packages,
        ranges=ranges,
        torch_cuda=cuda,
        torch_hip=hip,
        bnb_cuda=_bitsandbytes_libraries(),
        gpus=gpus,
        driver=driver,
        nvml=nvml,
        cores=_cores(),
        memory_gib=memory.total / GIB,
        free_gib=free_gib if device == "cpu" else memory.available / GIB,
        places=tuple(_place(what, path) for what, path in _folders(output)),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        token=_token(),
        encoding=(sys.stdout.encoding or "ascii").lower(),
        now=time.time(),
        built=Path(__file__).stat().st_mtime,
    )


def _packages() -> tuple[dict[str, str | None], dict[str, str]]:
    """{package: installed version or None} and {package: versions that lora_tune takes}."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("lora_tune") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    needed = [Requirement(line) for line in lines if "extra ==" not in line]
    ranges = {one.name: str(one.specifier) for one in needed}
    return {name: _version(name) for name in {*STACK, *ranges}}, ranges


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_build() -> tuple[str | None, str | None]:
    """CUDA and ROCm version that torch was built for, read from its version.py without importing it."""
    folder = _folder_of("torch")
    path = folder / "version.py" if folder else None
    text = path.read_text(encoding="utf-8") if path and path.is_file() else ""
    found = {name: re.search(rf"^{name}(?:: [^=]+)? = '([\d.]+)", text, re.MULTILINE) for name in ("cuda", "hip")}
    cuda, hip = (match[1] if match else None for match in found.values())
    return cuda, hip


def _bitsandbytes_libraries() -> tuple[str, ...]:
    folder = _folder_of("bitsandbytes")
    names = sorted(path.stem for path in folder.glob("libbitsandbytes_cuda*")) if folder else []
    return tuple(name.removeprefix("libbitsandbytes_cuda") for name in names)


def _folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    roots: Sequence[str] = spec.submodule_search_locations or () if spec else ()
    return Path(next(iter(roots))) if roots else None


def _gpus() -> tuple[tuple[Gpu, ...], str | None, str]:
    """The visible GPUs, the driver's version, and why there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return (), None, "nvidia-ml-py is not installed"
    except pynvml.NVMLError as error:
        return (), None, str(error)
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            handles = _visible(pynvml, handles, visible)
        return tuple(_gpu(pynvml, handle) for handle in handles), driver, ""
    except pynvml.NVMLError as error:
        return (), None, str(error)
    finally:
        pynvml.nvmlShutdown()


def _visible(nvml: Any, handles: list[Any], visible: str) -> list[Any]:
    """The handles that CUDA_VISIBLE_DEVICES names, in its order; it ends at the first that does not exist."""
    found = []
    for name in (part.strip() for part in visible.split(",")):
        if name.isdigit() and int(name) < len(handles):
            found.append(handles[int(name)])
        elif name.startswith(("GPU-", "MIG-")):
            found.append(nvml.nvmlDeviceGetHandleByUUID(name))
        else:
            break
    return found


def _gpu(nvml: Any, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))
        mode = _MODES.get(nvml.nvmlDeviceGetComputeMode(handle), "default")
    except nvml.NVMLError:  # slices of a card do not answer everything
        capability, mode = None, "default"
    return Gpu(str(nvml.nvmlDeviceGetName(handle)), memory.total / GIB, memory.free / GIB, capability, mode)


def _cores() -> int:
    """Cores that this process may use: by affinity, and by the quota of its control group (version 2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA.read_text().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, round(int(quota) / int(period))))


def _hub_home() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.path.expandvars(os.environ.get("HF_HOME") or caches / "huggingface")).expanduser()


def hub_cache() -> Path:
    """Where the hub's libraries keep what they download."""
    named = os.environ.get("HF_HUB_CACHE")
    return Path(os.path.expandvars(named)).expanduser() if named else _hub_home() / "hub"


def _folders(output: Path) -> list[tuple[str, Path]]:
    import platformdirs

    own = os.environ.get("LORA_TUNE_CACHE") or platformdirs.user_cache_dir("lora_tune", appauthor=False)
    temporary = Path(tempfile.gettempdir())
    return [("output", output), ("hub cache", hub_cache()), ("token cache", Path(own)), ("temporary files", temporary)]


def _place(what: str, path: Path) -> Place:
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    access: Literal["writable", "refused"] = "writable" if there.is_dir() and os.access(there, os.W_OK) else "refused"
    return Place(what, str(path), free_bytes(path) / GIB, access)


def _token() -> Literal["variable", "file", "none"]:
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "variable"
    named = os.environ.get("HF_TOKEN_PATH")
    path = Path(named) if named else _hub_home() / "token"
    return "file" if path.is_file() else "none"

"""What must hold on a machine for a training to work: a check is one function of the facts and one line of CHECKS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from lora_tune.model.machine import STACK, Machine, is_set

Verdict = Literal["ok", "note", "warning", "error"]
_DAY = 86_400.0
_BF16 = (8, 0)  # Ampere, the first generation with bfloat16 in hardware
# {CUDA major version of torch: oldest NVIDIA driver}: CUDA 13.0 release notes, table of minimum driver versions
_DRIVERS = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, and what to do about it. An error will make a training fail."""

    verdict: Verdict
    said: str
    fix: str = ""


Check = Callable[[Machine], Iterator[Finding]]


def python(machine: Machine) -> Iterator[Finding]:
    """Python is 3.11 or newer, with 64 bits."""
    said = f"{machine.python}, {machine.bits} bit, {machine.system}"
    if tuple(int(part) for part in machine.python.split(".")[:2]) < (3, 11):
        yield Finding("error", said, "install Python 3.11 or newer")
    elif machine.bits != 64:
        yield Finding("error", said, "install a 64-bit Python: torch has no other")
    else:
        yield Finding("ok", said)


def versions(machine: Machine) -> Iterator[Finding]:
    """Every package that lora_tune needs is there, in a version that it takes."""
    from packaging.specifiers import SpecifierSet

    if not machine.ranges:
        yield Finding("warning", "lora_tune is not installed, so that its ranges are not known", "pip install .")
    amiss = False
    for name, version in sorted(machine.packages.items()):
        wanted = machine.ranges.get(name, "")
        if version is None:
            amiss = True
            yield Finding("error", f"{name} is not installed", f"pip install '{name}{wanted}'")
        elif not SpecifierSet(wanted).contains(version, prereleases=True):
            amiss = True
            yield Finding("error", f"{name} {version}: lora_tune takes {wanted}", f"pip install '{name}{wanted}'")
    if not amiss:
        shown = (f"{name} {machine.packages[name]}" for name in STACK if machine.packages.get(name))
        yield Finding("ok", ", ".join(shown))


def gpu(machine: Machine) -> Iterator[Finding]:
    """Every GPU with its memory; what is free of it; whether torch can use it."""
    if not machine.gpus:
        hidden = machine.driver is not None
        said = "CUDA_VISIBLE_DEVICES shows none" if hidden else f"no NVIDIA GPU ({machine.nvml or 'none found'})"
        yield Finding("note", f"{said}: everything runs on the CPU, which trains small bases only")
        return
    for card in machine.gpus:
        said = f"{card.name}: {card.free_gib:.1f} of {card.total_gib:.1f} GiB free, driver {machine.driver}"
        if card.free_gib < 0.8 * card.total_gib:
            yield Finding("warning", said, "end the programs that hold its memory (nvidia-smi names them)")
        else:
            yield Finding("ok", said)
    if machine.torch_cuda is None and machine.torch_hip is None:
        yield Finding("error", "torch is a build for CPUs and does not see the GPU", "install torch's CUDA build")


def bfloat16(machine: Machine) -> Iterator[Finding]:
    """Whether the GPU has bfloat16 in hardware."""
    for card in machine.gpus:
        if card.capability is None:
            continue
        said = f"{card.name}: compute capability {card.capability[0]}.{card.capability[1]}"
        if card.capability >= _BF16:
            yield Finding("ok", f"{said}, bfloat16 in hardware")
        else:
            yield Finding("note", f"{said}, no bfloat16: float16 with loss scaling is used")


def driver(machine: Machine) -> Iterator[Finding]:
    """The driver is new enough for the CUDA that torch was built for."""
    if not machine.gpus or machine.torch_cuda is None or machine.driver is None:
        return
    major, have = int(machine.torch_cuda.split(".")[0]), machine.driver.split(".")[0]
    least = _DRIVERS.get(major)
    if least is None or not have.isdigit():
        yield Finding("note", f"driver {machine.driver} with torch for CUDA {machine.torch_cuda}: not known here")
    elif int(have) < least:
        said = f"driver {machine.driver} is too old for torch's CUDA {machine.torch_cuda}"
        yield Finding("error", said, f"install driver {least} or newer, or a torch for CUDA {major - 1}")
    else:
        yield Finding("ok", f"driver {machine.driver} suits torch's CUDA {machine.torch_cuda}")


def memory(machine: Machine) -> Iterator[Finding]:
    """Main memory: a base passes through it on its way to the GPU."""
    said = f"{machine.free_gib:.1f} of {machine.memory_gib:.1f} GiB free"
    if machine.free_gib < 2:
        yield Finding("warning", said, "end other programs: importing torch and a small base take about 2 GiB")
    else:
        yield Finding("ok", said)


def disk(machine: Machine) -> Iterator[Finding]:
    """Every folder that is written has room and may be written."""
    for place in machine.places:
        said = f"{place.what} {place.path}: {place.free_gib:,.1f} GiB free"
        if place.access == "refused":
            yield Finding("error", f"{place.what} {place.path}: cannot be written", _OTHER.get(place.what, "allow it"))
        elif place.free_gib < 0.5:
            yield Finding("error", said, f"make room, or {_OTHER.get(place.what, 'name another folder')}")
        elif place.free_gib < (20 if place.what == "hub cache" else 2):
            why = "a base of 7B parameters takes 15 GiB" if place.what == "hub cache" else "checkpoints may need more"
            yield Finding("warning", f"{said}; {why}", f"make room, or {_OTHER.get(place.what, 'name another folder')}")
        else:
            yield Finding("ok", said)


_OTHER = {
    "output": "name another output in the recipe",
    "hub cache": "set HF_HOME to another folder",
    "token cache": "set LORA_TUNE_CACHE to another folder",
    "temporary files": "set TMPDIR to another folder",
}


def hub(machine: Machine) -> Iterator[Finding]:
    """Whether there is a token, and whether connections are allowed; none is made."""
    where = {"variable": "a token is set (HF_TOKEN)", "file": "a token is stored", "none": "no token"}[machine.token]
    if machine.is_offline:
        fix = "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to download"
        yield Finding("note", f"{where}; offline: only what lies in the cache is found", fix)
    else:
        yield Finding("ok", f"{where}; {'gated bases need one; ' if machine.token == 'none' else ''}not tried (--hub)")


def threads(machine: Machine) -> Iterator[Finding]:
    """Threads for computing against the cores that there are."""
    said = f"{machine.cores} cores"
    asked = {name: machine.environment[name] for name in _THREADS if name in machine.environment}
    wrong = False
    for name, value in asked.items():
        if not value.isdigit() or int(value) < 1:
            wrong = True
            yield Finding("warning", f"{name}={value} is no number of threads", f"unset {name}")
        elif int(value) > machine.cores:
            wrong = True
            yield Finding("warning", f"{name}={value} on {said}: threads wait for each other", f"unset {name}")
        elif int(value) < machine.cores and not machine.gpus:
            wrong = True
            yield Finding("note", f"{name}={value} of {said}: training on the CPU is slower than it could be")
    if not wrong:
        yield Finding("ok", ", ".join([said, *(f"{name}={value}" for name, value in asked.items())]))
    if machine.environment.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "no", "off"):
        yield Finding("note", "TOKENIZERS_PARALLELISM is off: tokenizing uses one core")


_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def terminal(machine: Machine) -> Iterator[Finding]:
    """The terminal takes the characters of answers and tables."""
    if machine.encoding.replace("-", "").replace("_", "") in ("utf8", "utf8sig", "cp65001"):
        yield Finding("ok", machine.encoding)
    else:
        fix = "set PYTHONUTF8=1, or a UTF-8 locale such as LANG=C.UTF-8"
        yield Finding("warning", f"output is {machine.encoding}: answers in other scripts cannot be shown", fix)


def clock(machine: Machine) -> Iterator[Finding]:
    """The clock is not behind the files of this package: certificates would be refused, and times be wrong."""
    behind = machine.built - machine.now
    if behind > _DAY:
        said = f"the clock is {behind / _DAY:,.0f} days behind the files of this package"
        yield Finding("warning", said, "set the clock: downloads fail on certificates that are not valid yet")
    else:
        yield Finding("ok", "not behind the files of this package")


@dataclass(frozen=True, slots=True)
class KnownBad:
    """A combination that is known not to work, or not as expected; `source` is where that is written."""

    applies: Callable[[Machine], bool]
    verdict: Verdict
    said: str
    fix: str
    source: str


def known_bad(machine: Machine) -> Iterator[Finding]:
    """Combinations of KNOWN_BAD that hold here."""
    found = [one for one in KNOWN_BAD if one.applies(machine)]
    for one in found:
        yield Finding(one.verdict, f"{one.said} [{one.source}]", one.fix)
    if not found:
        yield Finding("ok", f"none of {len(KNOWN_BAD)} known combinations")


def _cuda(machine: Machine) -> tuple[int, ...] | None:
    """The CUDA version of torch, where there is a GPU that it would run on."""
    if machine.torch_cuda is None or not machine.gpus:
        return None
    return tuple(int(part) for part in machine.torch_cuda.split(".")[:2])


def _oldest(machine: Machine) -> tuple[int, int]:
    return min((card.capability for card in machine.gpus if card.capability), default=(99, 0))


def _newest(machine: Machine) -> tuple[int, int]:
    return max((card.capability for card in machine.gpus if card.capability), default=(0, 0))


def _lacks_library(machine: Machine) -> bool:
    cuda = _cuda(machine)
    return cuda is not None and bool(machine.bnb_cuda) and "".join(map(str, cuda)) not in machine.bnb_cuda


_RELEASE_13 = "CUDA 13.0 release notes, deprecated architectures"
KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(
        lambda machine: (_cuda(machine) or (0,)) >= (13, 0) and _oldest(machine) < (7, 5),
        "error",
        "torch for CUDA 13 has no code for GPUs before Turing (compute capability below 7.5)",
        "install a torch that is built for CUDA 12.6",
        f"{_RELEASE_13}; pytorch/pytorch#157517",
    ),
    KnownBad(
        lambda machine: (0,) < (_cuda(machine) or (0,)) < (12, 8) and _newest(machine) >= (10, 0),
        "error",
        "torch for CUDA before 12.8 has no code for Blackwell (compute capability 10 and 12)",
        "install a torch that is built for CUDA 12.8 or newer",
        "CUDA 12.8 release notes, new features",
    ),
    KnownBad(
        lambda machine: any(card.mode == "exclusive" for card in machine.gpus),
        "error",
        "the GPU admits one process, and an adapter is verified by a second one",
        "nvidia-smi --compute-mode=DEFAULT",
        "CUDA programming guide, compute modes",
    ),
    KnownBad(
        lambda machine: any(card.mode == "prohibited" for card in machine.gpus),
        "error",
        "the GPU is set to admit no process",
        "nvidia-smi --compute-mode=DEFAULT",
        "CUDA programming guide, compute modes",
    ),
    KnownBad(
        _lacks_library,
        "error",
        "bitsandbytes has no library for the CUDA version of torch",
        "install a newer bitsandbytes, or a torch for a CUDA version that it has",
        "bitsandbytes 0.50, cextension.py",
    ),
    KnownBad(
        lambda machine: "BNB_CUDA_VERSION" in machine.environment,
        "warning",
        "BNB_CUDA_VERSION makes bitsandbytes take another library than that of torch's CUDA",
        "unset BNB_CUDA_VERSION",
        "bitsandbytes 0.50, cextension.py",
    ),
    KnownBad(
        lambda machine: machine.torch_hip is not None,
        "warning",
        "torch is built for ROCm: lora_tune was never run on an AMD GPU",
        "rehearse first, and compare the losses with those of a CPU",
        "README, platforms",
    ),
    KnownBad(
        lambda machine: (
            "TRANSFORMERS_CACHE" in machine.environment and not {"HF_HOME", "HF_HUB_CACHE"} & set(machine.environment)
        ),
        "warning",
        "TRANSFORMERS_CACHE is not read any more: bases are downloaded again, to another folder",
        "set HF_HUB_CACHE to that folder",
        "transformers 5, in whose code the name is gone",
    ),
    KnownBad(
        lambda machine: is_set(machine.environment, "HF_HUB_ENABLE_HF_TRANSFER"),
        "warning",
        "HF_HUB_ENABLE_HF_TRANSFER changes nothing any more",
        "set HF_XET_HIGH_PERFORMANCE=1 for fast downloads",
        "huggingface_hub 1.0, constants.py",
    ),
    KnownBad(
        lambda machine: bool(machine.gpus) and machine.environment.get("CUDA_LAUNCH_BLOCKING") == "1",
        "warning",
        "CUDA_LAUNCH_BLOCKING=1 makes the GPU wait for the CPU at every operation",
        "unset CUDA_LAUNCH_BLOCKING",
        "PyTorch documentation, CUDA semantics",
    ),
)

CHECKS: dict[str, Check] = {
    "python": python,
    "versions": versions,
    "known bad": known_bad,
    "gpu": gpu,
    "driver": driver,
    "bfloat16": bfloat16,
    "memory": memory,
    "disk": disk,
    "hub": hub,
    "threads": threads,
    "terminal": terminal,
    "clock": clock,
}

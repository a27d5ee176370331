"""The fault cases, and the verdict on each: does the command with --resume end in the undisturbed run's adapter?"""

from __future__ import annotations

import errno
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.faults import places
from tests.faults.driver import RESUME, RUN, Attempt, Fault, Result, Server, process, result

_UNDAMAGED = "the other file has the same bytes"
NF4, *OTHERS = places.CONFIGURATIONS
_WRITES = ("write", "writev", "pwrite", "sendfile", "copy_file_range")  # operations that have a middle
_FULL = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT, "EROFS": errno.EROFS, "EACCES": errno.EACCES}


@dataclass(frozen=True)
class Case:
    """One run that is struck, as often as there are faults, and then resumed undisturbed."""

    group: str
    name: str
    configuration: str
    faults: tuple[Fault, ...] = ()
    server: str = "plain"
    """"plain", "power cut", or "process" for runs as processes of their own."""
    damage: tuple[str, str] | None = None
    """(file, kind) of the newest checkpoint of a run that was killed in its third save."""

    @property
    def key(self) -> str:
        """Its name among all cases."""
        return f"{self.group}: {self.configuration}: {self.name}"


@dataclass(frozen=True)
class Verdict:
    """What became of a case; `lost` says why, and is empty where the end was identical."""

    case: Case
    codes: tuple[int, ...]
    seconds: float
    lost: str = ""
    stopped: bool = False
    """Whether a run ended early; else it went on in spite of the fault."""

    def as_row(self) -> dict[str, Any]:
        """One line of the grid's record."""
        return {
            "key": self.case.key,
            "group": self.case.group,
            "codes": list(self.codes),
            "stopped": self.stopped,
            "seconds": round(self.seconds, 2),
            "lost": self.lost,
        }


@dataclass(frozen=True)
class Reference:
    """The undisturbed run of a configuration: its place before it began, its outcome, its file operations."""

    place: Path
    result: Result
    operations: tuple[tuple[str, str], ...]
    seconds: float

    def between(self, first: str, last: str) -> range:
        """The numbers of the operations from the first to the last one whose path starts with these."""
        paths = [path for _, path in self.operations]
        starts = [number for number, path in enumerate(paths, 1) if path.startswith(first)]
        ends = [number for number, path in enumerate(paths, 1) if path.startswith(last)]
        return range(starts[0], ends[-1] + 1)

    @property
    def second_save(self) -> int:
        """The step of the second checkpoint."""
        saved = {path.split("/")[2] for _, path in self.operations if path.startswith("out/checkpoints/step-")}
        return sorted(int(name.removeprefix("step-")) for name in saved)[1]

    def save(self, step: int) -> range:
        """The operations of the checkpoint of a step: from making its folder to the rename and the sync after it."""
        staged = self.between(f"out/checkpoints/.writing-step-{step:08d}", f"out/checkpoints/step-{step:08d}")
        return range(staged.start, staged.stop + 1)


@dataclass
class Grid:
    """Servers and references for cases; `play` runs one."""

    injector: Path
    folder: Path
    servers: dict[str, Server] = field(default_factory=dict)
    references: dict[str, Reference] = field(default_factory=dict)
    proof: Literal["made", "left out"] = "made"
    """Whether a finished folder is loaded and verified at the end, of which the same bytes were verified before."""
    keep: Path | None = None
    """Where the folders of lost cases are kept."""

    def __enter__(self) -> Grid:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers.values():
            server.__exit__()

    def server(self, name: str) -> Server:
        """The warm server of that name, started when it is first asked for."""
        if name not in self.servers:
            faults = {"FAULT_DROP_UNSYNCED": "1"} if name == "power cut" else {}
            folder = self.folder / f"server-{name.replace(' ', '-')}"
            self.servers[name] = Server(self.injector, folder, faults).__enter__()
            self.servers[name].warm(places.write_place(folder / "warm", NF4))
        return self.servers[name]

    def reference(self, configuration: str) -> Reference:
        """The undisturbed run of a configuration."""
        if configuration not in self.references:
            number = list(places.CONFIGURATIONS).index(configuration)
            place = places.write_place(self.folder / f"place-{number}", configuration)
            ran = places.copy_place(place, self.folder / f"reference-{number}")
            server = self.server("plain")
            began = time.monotonic()
            attempt, operations = server.operations(ran)
            found = result(ran)
            if attempt.code or found is None:
                raise RuntimeError(f"the undisturbed run of {configuration} ended with {attempt.code}: {attempt.err}")
            seconds = time.monotonic() - began
            self.references[configuration] = Reference(place, found, tuple(operations), seconds)
        return self.references[configuration]

    def play(self, case: Case) -> Verdict:
        """Run a case to its end and judge it."""
        reference = self.reference(case.configuration)
        began = time.monotonic()
        folder = self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        attempts: list[Attempt] = []
        if case.damage is None:
            places.copy_place(reference.place, folder)
        else:
            attempts.append(self._damaged(case, folder))
        for fault in case.faults:
            attempts.append(self._run(case, folder, RESUME if attempts else RUN, fault))
            if attempts[-1].code == 0:
                break
        stopped = attempts[-1].code != 0
        if stopped:
            attempts.append(self._run(case, folder, RESUME, None))
        lost = judge(case, attempts, result(folder), reference.result)
        if lost and self.keep:
            kept = self.keep / case.key.replace("/", "_").replace(" ", "_")
            shutil.copytree(folder, kept, symlinks=True, dirs_exist_ok=True)
        codes = tuple(attempt.code for attempt in attempts)
        return Verdict(case, codes, time.monotonic() - began, lost, stopped)

    def _run(self, case: Case, folder: Path, arguments: Sequence[str], fault: Fault | None) -> Attempt:
        if case.server != "process":
            return self.server(case.server).run(folder, arguments, fault, proof=self.proof)
        if fault is None:
            return process(self.injector, folder, arguments, {})
        if fault.kill_after_s is not None:
            return process(self.injector, folder, arguments, {}, kill_after_s=fault.kill_after_s)
        faults = {"FAULT_MODE": fault.mode, "FAULT_AT": str(fault.at), "FAULT_ERRNO": str(fault.errno)}
        if fault.signal:
            faults["FAULT_SIGNAL"] = str(fault.signal["number"])
        return process(self.injector, folder, arguments, faults)

    def _damaged(self, case: Case, folder: Path) -> Attempt:
        """A copy of a run that was killed in its third save, its newest checkpoint damaged as the case says."""
        if case.damage is None:
            raise ValueError(case)
        file, kind = case.damage
        killed = self._killed(case.configuration)
        places.copy_place(killed, folder)
        newest, older = (folder / "work/out/checkpoints" / f"step-{step:08d}" for step in (4, 2))
        other = self._killed(case.configuration, "seed=7", "train.learning_rate=2e-3") / "work/out/checkpoints"
        damage(newest / file, kind, older=older / file, other=other / newest.name / file)
        before = (killed / "work/out/checkpoints" / newest.name / file).read_bytes()
        same = (newest / file).exists() and (newest / file).read_bytes() == before
        return Attempt(-9, (), _UNDAMAGED if same else "")

    def _killed(self, configuration: str, *overrides: str) -> Path:
        """A run that was killed when its third checkpoint was about to be written."""
        reference = self.reference(configuration)
        folder = self.folder / "-".join(["killed", str(list(places.CONFIGURATIONS).index(configuration)), *overrides])
        if not folder.exists():
            places.copy_place(reference.place, folder)
            self.server("plain").run(folder, (*RUN, *overrides), Fault("kill_before", reference.save(6).start))
        return folder


def judge(case: Case, attempts: Sequence[Attempt], found: Result | None, wanted: Result) -> str:
    """Why a case is lost, or an empty text where everything is as in the undisturbed run."""
    said = "".join(attempt.err for attempt in attempts)
    if attempts[-1].code != 0 or found is None:
        return f"the last run ended with {attempts[-1].code}: {attempts[-1].err[-600:]}"
    for attempt, fault in zip(attempts, case.faults, strict=False):
        if attempt.code not in (0, *_expected(fault)):
            return f"the struck run ended with {attempt.code}: {attempt.err[-600:]}"
    if "Traceback" in said or "a fault in lora_tune" in said:
        return f"a fault or traceback: {said[-600:]}"
    if found.losses != wanted.losses:
        return f"losses differ: {found.losses} for {wanted.losses}"
    wrong = [name for name, digest in wanted.files.items() if found.files[name] != digest]
    if wrong:
        return f"files differ: {wrong}"
    if found.untidy:
        return f"left over: {found.untidy}"
    steps = dict(wanted.losses)
    if any(steps.get(step) != loss for attempt in attempts for step, loss in attempt.steps):
        return "a step that was taken again had another loss"
    if case.damage is not None and attempts[0].err != _UNDAMAGED:
        first = attempts[-1].steps[0][0] if attempts[-1].steps else 0
        named = case.damage[0] in said or ("set aside as damaged-step-00000004" in said and "manifest" in case.name)
        if not named or first != 3:
            return f"no fall back that names {case.damage[0]}: first step {first}: {said[-600:]}"
    elif (
        case.damage is None
        and case.server != "process"
        and all(fault.mode.startswith("kill") or fault.signal for fault in case.faults)
    ):
        return _repeated(case, attempts)
    return ""


def _expected(fault: Fault) -> tuple[int, ...]:
    """The exit codes with which a run may end that is struck by this."""
    if fault.signal:
        return (128 + int(fault.signal["number"]),)
    return (2, 4) if fault.mode.startswith("fail") else (-signal.SIGKILL,)


def _repeated(case: Case, attempts: Sequence[Attempt]) -> str:
    taken = 0
    every = len(dict(attempts[-1].steps)) if "epochs" in case.configuration else places.SAVE_EVERY
    for attempt in attempts:
        if attempt.steps:
            repeated = taken - attempt.steps[0][0] + 1
            if repeated > max(every, places.SAVE_EVERY):
                return f"{repeated} steps were taken again"
            taken = max(taken, attempt.steps[-1][0])
    return ""


# -- damages of a file ----------------------------------------------------------------------------------------------

FILES = (
    "adapter.safetensors", "optimizer.safetensors", "optimizer.json", "random.safetensors", "random.json",
    "schedule.json", "trainer_state.json", "run.json", "manifest.json", "metrics.jsonl",
)  # fmt: skip
DAMAGES = (
    "missing", "empty", "half", "a byte short", "a byte more", "zeros in the second half", "a bit of the data",
    "a bit of the head", "the older file", "another run's file",
)  # fmt: skip


def damage(path: Path, kind: str, *, older: Path, other: Path) -> None:
    """Damage a file of a checkpoint in one of the ways of DAMAGES."""
    content = path.read_bytes()
    half, late = len(content) // 2, len(content) * 3 // 4
    changed = {
        "empty": b"",
        "half": content[:half],
        "a byte short": content[:-1],
        "a byte more": content + b"\0",
        "zeros in the second half": content[:half] + bytes(len(content) - half),
        "a bit of the data": content[:late] + bytes([content[late] ^ 1]) + content[late + 1 :],
        "a bit of the head": content[:9] + bytes([content[9] ^ 1]) + content[10:],
        "the older file": older.read_bytes(),
        "another run's file": other.read_bytes(),
    }
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(changed[kind])


# -- the groups -----------------------------------------------------------------------------------------------------


def kills(group: str, configuration: str, reference: Reference, numbers: Sequence[int]) -> Iterator[Case]:
    """A kill before each of these operations, and in the middle of those that write."""
    for number in numbers:
        operation, path = reference.operations[number - 1]
        for mode in ("kill_before", "kill_mid") if operation in _WRITES else ("kill_before",):
            yield Case(group, f"{mode} {number} {operation} {_shown(path)}", configuration, (Fault(mode, number),))


def power_cuts(reference: Reference, numbers: Sequence[int]) -> Iterator[Case]:
    """A power cut before each of these operations: bytes that no fsync covered are gone."""
    for number in numbers:
        operation, path = reference.operations[number - 1]
        fault = Fault("kill_before", number)
        yield Case("power cut", f"{number} {operation} {_shown(path)}", NF4, (fault,), server="power cut")


def full_disks(kind: str, mode: str, reference: Reference, numbers: Sequence[int]) -> Iterator[Case]:
    """An operation fails with this error: once (`fail`), or from then on (`fail_from`)."""
    words = {"fail": "once", "fail_from": "from there on"}[mode]
    for number in numbers:
        operation, path = reference.operations[number - 1]
        fault = Fault(mode, number, errno=_FULL[kind])
        yield Case(f"{kind} {words}", f"{number} {operation} {_shown(path)}", NF4, (fault,))


def random_kills(count: int, references: Mapping[str, Reference], *, seed: int = 1) -> Iterator[Case]:
    """kill -9 at a random moment of a run of a random configuration."""
    draw = random.Random(seed)
    for number in range(count):
        configuration = draw.choice(sorted(references))
        share = draw.uniform(0.0, 1.1)
        fault = Fault(kill_after_s=share * references[configuration].seconds)
        yield Case("random kill", f"{number}: after {share:.3f} of a run's time", configuration, (fault,))


def deep_kills(count: int, reference: Reference, *, depth: int = 3, seed: int = 2) -> Iterator[Case]:
    """Killed at a random operation, and killed again in each of the resumed runs."""
    draw = random.Random(seed)
    for number in range(count):
        points = [draw.randint(len(reference.operations) // 4, len(reference.operations))]
        points += [draw.randint(1, len(reference.operations) // 3) for _ in range(depth - 1)]
        faults = tuple(Fault(draw.choice(("kill_before", "kill_mid")), point) for point in points)
        yield Case("killed again during the resume", f"{number}: {points}", NF4, faults)


def damages() -> Iterator[Case]:
    """Each file of the newest checkpoint damaged in each way."""
    for file in FILES:
        for kind in DAMAGES:
            yield Case("damaged checkpoint", f"{file}: {kind}", NF4, damage=(file, kind))


def processes(reference: Reference) -> Iterator[Case]:
    """The same faults on processes of their own: no fork, nothing warm, the proof in a fresh process."""
    group = "as processes of their own"
    named = {
        "in the second save": reference.save(4).start + 30,
        "at the rename of the third": reference.save(6).stop - 2,
        "while the oldest is deleted": reference.save(6).stop + 3,
        "when the adapter was renamed": reference.operations.index(("rename", "out/adapter_model.safetensors")) + 2,
        "before the manifest": len(reference.operations) - 1,
    }
    for where, number in named.items():
        yield Case(group, f"kill -9 {where}", NF4, (Fault("kill_mid", number),), server="process")
    for after in (2.0, 7.0, 9.0, 11.0):
        yield Case(group, f"kill -9 after {after} s", NF4, (Fault(kill_after_s=after),), server="process")
    for name, number in SIGNALS.items():
        fault = Fault("kill_before", reference.save(4).start, signal={"number": number})
        yield Case(group, f"{name} in the second save", NF4, (fault,), server="process")
    for kind in ("ENOSPC", "EIO"):
        fault = Fault("fail_from", reference.save(4).start + 5, errno=_FULL[kind])
        yield Case(group, f"{kind} from the second save on", NF4, (fault,), server="process")


SIGNALS = {name: int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")}


def signals(phases: Sequence[str]) -> Iterator[Case]:
    """Each signal in each phase."""
    configuration = OTHERS[1]  # evaluates after every step
    for name, number in SIGNALS.items():
        for phase in phases:
            fault = Fault(signal={"phase": phase, "number": number, "turn": 3 if phase == "training" else 1})
            yield Case("signal", f"{name} while {phase}", configuration, (fault,))


def _shown(path: str) -> str:
    """A path without what temporary files have of the process: an interrupted grid knows its cases again."""
    found = re.fullmatch(r"(.*?)(\.\d+)?\.tmp.*", path)
    return path if found is None else found[1].replace("out/checkpoints/", "")

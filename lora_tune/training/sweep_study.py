"""The memory of a sweep: which runs there are, with which values, how far each came (the only caller of Optuna).

It lies in `journal.log` of the sweep's folder, to which Optuna appends a line for everything that happens, so that a
sweep that was killed knows its runs again, those included that were under way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_tune.errors import Problem, UsageError
from lora_tune.training.sweep_space import Axis

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
Sampler = Literal["grid", "random", "tpe"]
Ended = Literal["complete", "pruned", "failed", "running", "waiting"]
_COMPARED = 2  # finished runs before one is pruned


@dataclass(frozen=True, slots=True)
class Known:
    """A run as the journal knows it: its values, where it stands, its last loss, the held-out losses by step.

    `same_as` is an earlier run with the same values, whose loss this one has without having been trained.
    """

    number: int
    values: Mapping[str, str]
    state: Ended
    loss: float | None
    losses: tuple[tuple[int, float], ...]
    reason: str = ""
    same_as: int | None = None


class StudyRun:
    """One run under way: what it may report, and whether it should go on."""

    def __init__(self, study: optuna.Study, trial: optuna.Trial, values: Mapping[str, str]) -> None:
        self._study, self._trial, self.values = study, trial, values
        self.number: int = trial.number
        self._reported = set(study._storage.get_trial(trial._trial_id).intermediate_values)

    def report(self, step: int, loss: float) -> Literal["go on", "prune"]:
        """A held-out loss of this step; says whether the run is worth going on with."""
        if step not in self._reported:
            self._reported.add(step)
            self._trial.report(loss, step)
        return "prune" if self._trial.should_prune() else "go on"

    def end(self, state: Literal["complete", "pruned", "failed"], *, loss: float | None, reason: str = "") -> None:
        """Write down how the run ended."""
        from optuna.trial import TrialState

        if reason:
            self._trial.set_user_attr("reason", reason)
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        self._study.tell(self._trial, loss if state == "complete" else None, state=states[state])

    def same_as(self, number: int, loss: float) -> None:
        """End the run with the loss of an earlier one that had the same values."""
        self._trial.set_user_attr("same_as", number)
        self.end("complete", loss=loss)


class SweepStudy:
    """The runs of a sweep, in `folder`; opened by one process at a time."""

    def __init__(self, folder: Path, axes: Sequence[Axis], *, sampler: Sampler, seed: int, prune: str) -> None:
        optuna = _optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = folder / JOURNAL
        _mend(journal)
        storage = JournalStorage(JournalFileBackend(str(journal)))
        self.axes, self.sampler = tuple(axes), sampler
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_COMPARED) if prune == "median" else None
        self._study = optuna.create_study(
            storage=storage,
            study_name="sweep",
            direction="minimize",
            load_if_exists=True,
            pruner=pruner or optuna.pruners.NopPruner(),
        )
        again = seed + len(self._study.get_trials(deepcopy=False))  # or a sampler draws what it drew before
        kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        self._study.sampler = kinds.get(sampler, optuna.samplers.RandomSampler)(seed=again)

    def plan(self, runs: Sequence[Mapping[str, str]]) -> None:
        """Note runs that are to come, in this order; those that the journal has already are left out."""
        for values in runs:
            self._study.enqueue_trial(dict(values), skip_if_exists=True)

    def interrupted(self) -> list[StudyRun]:
        """The runs that were under way when the sweep ended, to be gone on with."""
        import optuna
        from optuna.trial import TrialState

        left = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [self._run(optuna.Trial(self._study, frozen._trial_id)) for frozen in left]

    def next(self) -> StudyRun:
        """A new run, with the values that were planned for it or that the sampler draws."""
        return self._run(self._study.ask())

    def waiting(self) -> int:
        """How many planned runs were not started."""
        return sum(known.state == "waiting" for known in self.known())

    def known(self) -> list[Known]:
        """All runs, by number."""
        return [self._known(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def _run(self, trial: optuna.Trial) -> StudyRun:
        return StudyRun(self._study, trial, {axis.key: _suggest(trial, axis) for axis in self.axes})

    def _known(self, frozen: optuna.trial.FrozenTrial) -> Known:
        states: dict[str, Ended] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "WAITING": "waiting"}
        losses = tuple(sorted(frozen.intermediate_values.items()))
        params = frozen.params or frozen.system_attrs.get("fixed_params", {})
        return Known(
            frozen.number,
            {axis.key: _text(params[axis.key], axis) for axis in self.axes if axis.key in params},
            states.get(frozen.state.name, "running"),
            frozen.value if frozen.state.name == "COMPLETE" else (losses[-1][1] if losses else None),
            losses,
            str(frozen.user_attrs.get("reason", "")),
            frozen.user_attrs.get("same_as"),
        )


def _suggest(trial: optuna.Trial, axis: Axis) -> str:
    if axis.ends is None:
        return _text(trial.suggest_categorical(axis.key, axis.values), axis)
    if axis.whole:
        low, high = map(int, axis.ends)
        return _text(trial.suggest_int(axis.key, low, high, log=axis.logarithmic), axis)
    return _text(trial.suggest_float(axis.key, *map(float, axis.ends), log=axis.logarithmic), axis)


def _text(value: Any, axis: Axis) -> str:
    """The value as a recipe has it: drawn numbers with four digits."""
    return str(value) if axis.ends is None or axis.whole else f"{value:.4g}"


def _mend(journal: Path) -> None:
    """Cut a last line off that a kill left half written, and a lock that nobody holds any more."""
    if journal.exists():
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            journal.write_bytes(whole)
    with contextlib.suppress(OSError):
        journal.with_name(journal.name + ".lock").unlink()


def _optuna() -> Any:
    """Optuna, or how to have it. Raises: UsageError."""
    try:
        import optuna
    except ImportError:
        raise UsageError(Problem("a sweep needs Optuna", "pip install 'lora_tune[sweep]'")) from None
    return optuna


def best_of(runs: Sequence[Known]) -> Known | None:
    """The finished run with the lowest held-out loss; of equal ones the first."""
    done = [run for run in runs if run.state == "complete" and run.loss is not None and run.same_as is None]
    return min(done, key=lambda run: (run.loss or 0.0, run.number), default=None)


def by_loss(runs: Sequence[Known]) -> Iterator[Known]:
    """Finished runs by loss, then those that were pruned, failed or never ended, by number."""
    yield from sorted(runs, key=lambda run: (run.state != "complete", run.loss if run.state == "complete" else 0.0,
                                             run.number))  # fmt: skip

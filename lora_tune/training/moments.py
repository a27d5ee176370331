"""The moments of a training: after which steps it is evaluated and saved, and when it stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from lora_tune.training.trainer import RunTrainer


class Moments(TrainerCallback):
    """Evaluate and save every so many steps, save at the end of an epoch, and stop when a signal came."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """What is due after this step."""
        trainer, step = self.trainer, state.global_step
        control.should_evaluate = bool(trainer.evaluations and trainer.evaluations.due(step, last_step=state.max_steps))
        control.should_save = bool(trainer.save_every and step % trainer.save_every == 0) or step >= state.max_steps
        if trainer.stop_signal is not None:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop where a signal came while the checkpoint was written."""
        if self.trainer.stop_signal is not None and self.trainer.saved_step == state.global_step:
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """What is due after an epoch."""
        control.should_evaluate = False
        control.should_save = self.trainer.save_every is None or control.should_training_stop
        return control

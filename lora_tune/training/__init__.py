"""Training: the trainer, its checkpoints and its progress."""

import logging


class _NotSo(logging.Filter):
    """Drops two warnings of upstream that do not hold here, and nothing else.

    Of several processes each is the only one to transformers, which warns that it sees a process group all the same.
    TRL, which does not see that our rows are packed, advises against one of them at a time.
    """

    messages = ("process group", "per_device_train_batch_size of 1 with padding-free training")

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not any(message in said for message in self.messages)


_NOT_SO = _NotSo()
for _name in ("transformers.training_args", "trl.trainer.sft_trainer"):
    logging.getLogger(_name).addFilter(_NOT_SO)

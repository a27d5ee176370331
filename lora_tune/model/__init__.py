"""The base model: where it is, how it is loaded, adapter methods, memory, generation, merging."""

import logging


class _KnownNoise(logging.Filter):
    """Drops three known messages and nothing else.

    Those of bitsandbytes at its import and at every int8 forward are harmless; what the table of tensors says that
    transformers logs is an error or a warning of `load_base`. It stands here because PEFT imports bitsandbytes, so that
    the first of them may come before anything of this package but its name is imported.
    """

    messages = ("Failed to load CPU gemm_4bit_forward", "MatMul8bitLt: inputs will be cast from", "LOAD REPORT")

    def filter(self, record: logging.LogRecord) -> bool:
        start = record.getMessage()[:200]
        return not any(message in start for message in self.messages)


_NOISE = _KnownNoise()
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "transformers.modeling_utils"):
    logging.getLogger(_name).addFilter(_NOISE)

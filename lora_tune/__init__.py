"""lora_tune: from one recipe to a proven LoRA adapter folder."""

__version__ = "0.1.0"

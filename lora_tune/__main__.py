"""`python -m lora_tune VERB …` is `lora-tune VERB …`."""

from lora_tune.cli import entry

if __name__ == "__main__":
    entry()

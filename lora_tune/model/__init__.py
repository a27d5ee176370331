"""The base model: where it is, how it is loaded, adapter methods, memory, generation, merging."""

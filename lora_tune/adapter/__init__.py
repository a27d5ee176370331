"""The adapter folder: written, checked, loaded."""

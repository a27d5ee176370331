"""Data: from files to token rows."""

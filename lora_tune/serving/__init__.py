"""Models that answer: the embedded engine, HTTP in front of it, and other engines."""

"""Evaluation: scores of base and adapter on the same rows."""

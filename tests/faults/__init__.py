"""Faults on purpose: kills, damaged files, full disks and signals, and whether a run goes on to the same adapter."""

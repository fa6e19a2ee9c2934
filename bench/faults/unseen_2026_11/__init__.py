"""Faults of 2026-11: written by another hand than the suite and the rules, in five sets."""

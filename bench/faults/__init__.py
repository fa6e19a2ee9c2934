"""Faults that keep a trainer from learning, as patches of a few lines: what the rules of health are measured on."""

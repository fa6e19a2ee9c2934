"""Trained networks in use: a run opened, its network called on measurements, and what it found written to files."""

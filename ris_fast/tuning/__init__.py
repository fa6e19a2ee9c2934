"""Tuning: the space of settings, the study that many processes share, and trials that are ended early."""

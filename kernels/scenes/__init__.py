"""Scenes from their parameters in one pass: channel, snapshots and target factor, random numbers made where they are
used."""

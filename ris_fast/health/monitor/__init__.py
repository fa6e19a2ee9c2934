"""Rules over what a run reports while it goes."""

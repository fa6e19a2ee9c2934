"""Learning health: why a run does not learn, said at once and by name."""

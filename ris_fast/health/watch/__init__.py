"""Learning health in anyone's loop."""

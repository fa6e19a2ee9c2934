"""Names of the baselines, for readers of a run's figures that need no torch."""

CONSTANT_BASELINES = (
    "zero",
    "identity",
    "mean",
)  # they ignore the scene; any other one is made of the network's inputs

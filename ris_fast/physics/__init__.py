"""The scene behind the surface: array, channel, codes, simulation, baselines. Pure functions on tensors."""

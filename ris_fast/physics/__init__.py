"""The scene behind the surface: array, channel, codes, simulation, floors. Pure functions on tensors."""

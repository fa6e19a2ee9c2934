"""One run trained by several processes, each with its share of the scenes of every step."""

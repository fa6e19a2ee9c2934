"""The field on the surface, estimated from the snapshots by linear least squares; no network."""

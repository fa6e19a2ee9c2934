"""From covariances and snapshots to positions: spectra, likelihood, bounds and how estimates are scored."""

"""Covariance NMSE between low-rank factors: value and gradient in one pass, no N x N array."""

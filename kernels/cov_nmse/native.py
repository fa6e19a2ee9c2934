"""Calls the C++ covariance NMSE (native.cpp) on CPU tensors."""

from __future__ import annotations

from . import plain

cov_nmse = plain.cov_nmse

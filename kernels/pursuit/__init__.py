"""Weighted pursuit of the sources of a scene, as network inputs and factor columns in one operator."""

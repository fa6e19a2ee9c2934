"""Scenes for training: simulated on the device, from our own shards, or from the original pipeline's .npz files."""

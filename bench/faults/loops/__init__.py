"""Plain PyTorch loops for `watch`: with a mistake, the same without it, and unusual ones that are right."""

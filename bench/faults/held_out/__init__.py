"""The held-out third of every family: written before any rule, and not read while rules are written or tuned."""

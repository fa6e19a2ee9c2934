"""Multi-head self-attention of few tokens: queries, keys and values as one product leaves them, no copies."""

"""What ours is measured against: a clean eager loop, the same compiled, and the original's training step."""

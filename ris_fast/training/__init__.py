"""Training: the loss, the fused optimizer, the step, the schedule, the loop and checkpoints."""

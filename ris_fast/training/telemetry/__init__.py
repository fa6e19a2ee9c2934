"""What a step measures of itself, brought to the host without waiting."""

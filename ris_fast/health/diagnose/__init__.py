"""What `ris-fast why` makes of a run that is over."""

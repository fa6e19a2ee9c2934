"""FusedAdamW and its parts."""

"""What every package may use: atomic files, counter-based random numbers, strict JSON, name suggestions, progress."""

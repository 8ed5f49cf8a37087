"""Benchmarks of training steps and of data preparation, as ratios within one run."""

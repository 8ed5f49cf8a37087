"""Times what the product does, as ratios within one run: `step` of training, `data` from text to batches."""

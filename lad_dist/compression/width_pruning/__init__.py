"""Width pruning: an encoder of fewer coordinates, heads and intermediate units, fitted to a sample of its data."""

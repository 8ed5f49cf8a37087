"""Training: resolve a config, build the run, train, evaluate, export."""

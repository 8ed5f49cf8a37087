"""How good, how small and how fast a model is."""

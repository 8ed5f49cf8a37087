"""Connection to a Ray cluster."""

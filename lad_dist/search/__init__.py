"""Hyper-parameter searches and grids with Ray Tune."""

"""Checkpoints: committed folders, background saves, loading at another world size."""

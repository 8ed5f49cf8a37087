"""Hugging Face encoders: read, created, run on flat tokens, saved."""

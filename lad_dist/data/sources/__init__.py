"""Readers of raw text: files, tables, hub datasets."""

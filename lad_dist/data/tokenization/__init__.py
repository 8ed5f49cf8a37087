"""Tokenizers: loading, training, encoding, special tokens."""

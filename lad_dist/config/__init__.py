"""Configs: schema, loading, checks, key descriptions, user errors and exit codes."""

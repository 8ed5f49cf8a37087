"""Run folders, model cards and plots."""

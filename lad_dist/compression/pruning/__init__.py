"""Pruning: criteria, schedules and the modules that hold masks."""

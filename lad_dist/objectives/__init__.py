"""Objectives of distillation: what a student learns from labels and from a teacher, one loss per file."""

"""Labelled data: GLUE, the user's own files, tagging, questions, and the metrics of tasks."""

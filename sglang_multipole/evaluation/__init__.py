"""Accuracy on long-context tasks, measured through a server: see docs/evaluation.md."""

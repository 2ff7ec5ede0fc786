"""Evaluations of checkpoints: what validation loss does not show. See evals/README.md."""

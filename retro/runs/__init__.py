"""Runs: checkpoints, the folder of a run and what it was made with, and tracking."""

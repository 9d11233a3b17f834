"""Saves and restores the state of a run, and checks that checkpoints are complete."""

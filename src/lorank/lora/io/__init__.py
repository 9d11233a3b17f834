"""Saves adapters to files, loads them, and loads weights into a live model."""

"""Adapters from and to files, and weights into a live model."""

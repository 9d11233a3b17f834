"""`lorank compare`: methods at equal final parameters, each at its own best learning rate, on fresh seeds."""

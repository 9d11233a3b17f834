"""What accompanies a run: one class each, with the hooks of :class:`~lorank.training.integrations.base.Integration`."""

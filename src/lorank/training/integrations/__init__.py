"""The integrations of a run with other features, each a subclass of
:class:`~lorank.training.integrations.base.Integration`."""

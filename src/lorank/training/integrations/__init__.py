"""The integrations of a run (gradient scalers, ``torch.compile``, quantised bases, …), one class per file."""

"""The engine of experiments: trials with one line of results each, processes that do them, and the choice of rates."""

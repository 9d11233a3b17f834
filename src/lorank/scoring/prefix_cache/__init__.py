"""The exact engine: losses of ablated variants, with their common computations done once."""

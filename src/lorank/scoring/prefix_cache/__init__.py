"""The exact engine: losses of ablated variants, with what they share computed once."""

"""A cache as TransformerLens's `ActivationCache`. TransformerLens itself is imported when one is exported."""

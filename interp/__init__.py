"""The analyses: one module per method a paper would name."""

"""What works on which architecture, measured on the tiny models: `python -m tests.architectures.table`."""

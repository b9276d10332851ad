"""Checkpoints on disk: which files hold one, and what their tensors are called in the model."""

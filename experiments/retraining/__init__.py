"""RL once more from IN, with components frozen."""

"""The recipe of the embedded triple: a tiny vision-language model trained Base -> IN -> RL from nothing."""

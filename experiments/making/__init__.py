"""Commands that ask nothing of a pair, but make files that others read: a merged checkpoint, names for trainers."""

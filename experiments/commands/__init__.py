"""The commands of `frankenlens`: one file per question asked of a pair."""

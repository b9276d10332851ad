"""Random input of every kind that a user can give: answered, or refused by one of our own errors, within a second."""

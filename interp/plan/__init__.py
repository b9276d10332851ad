"""What a command will cost, counted before it is run: from configurations alone, without a weight."""

"""What an operator asks: how the tasks stand, what they cost and saved, whether a configuration works."""

"""A task simulated before anybody pays: the real decisions over worlds that a scenario describes."""

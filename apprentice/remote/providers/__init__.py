"""One provider a file, called as in `remote.provider`; ``REGISTERED`` is its class."""

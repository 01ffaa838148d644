"""One trainer a file, called as in `local.fine_tune_backend`; ``REGISTERED`` is its class."""

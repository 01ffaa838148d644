"""One engine a file, called as in `local.backend`; ``REGISTERED`` is its class."""

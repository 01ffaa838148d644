"""The stores of tests/store, for events too."""

from tests.store.conftest import new_postgres, postgres_server, url

__all__ = ["new_postgres", "postgres_server", "url"]

"""What Acme adds to Apprentice; pyproject.toml says under which names."""

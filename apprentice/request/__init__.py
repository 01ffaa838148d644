"""One request: from the call to its answer, its record and its comparison."""

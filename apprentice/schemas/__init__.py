"""A task's schemas: four ways to write one, strict checks, and JSON values as they are kept."""

"""Coaching: the Prefect flows that turn kept examples into a promoted version of a task's local model."""

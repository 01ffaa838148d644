"""The thin HTTP router: the same path as `AsyncApprentice.run`, behind `POST /v1/tasks/{name}`."""

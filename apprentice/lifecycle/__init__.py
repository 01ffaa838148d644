"""What happens to a task beside its requests: training that falls due, changes of its definition, a missing coach."""

"""What a response earns, from a task, a function or a model."""

"""Text: files, tokens, batches, logged rows and solutions; no jax."""

"""Reads final answers in text that a model wrote, and compares them."""

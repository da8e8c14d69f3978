"""Flax ports of Hugging Face models."""

"""JAX/Flax functions for reinforcement learning on language models."""

import os

__version__ = "0.1.0"

# transformers tells every process that it found no torch. None is needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

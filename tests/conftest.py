"""Settings of every test: eight CPU devices, strict shapes and dtypes."""

import os
import pathlib
import signal

# A shell that starts tests in the background has their interrupts ignored, and
# those of the processes that they start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile(
  "rljax", deadline=None, derandomize=True, max_examples=20
)
hypothesis.settings.load_profile("rljax")

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def shared(path: str) -> pathlib.Path:
  """The file or folder `path` of the data beside the checkout, or a skip."""
  root = os.environ.get("RLJAX_SHARED", REPOSITORY.parent / "shared")
  found = pathlib.Path(root) / path
  if not found.exists():
    pytest.skip(f"needs {path} in the folder that RLJAX_SHARED names")
  return found

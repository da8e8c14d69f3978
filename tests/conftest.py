"""Settings of every test: eight CPU devices, strict shapes and dtypes."""

import importlib.metadata
import os
import pathlib
import shutil
import signal
import tempfile

# A shell that starts tests in the background has their interrupts ignored, and
# those of the processes that they start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs of tests are run a few times: fewer passes compile them in a fifth of
# the time. Newer releases end the process at the flag of the emitters.
COMPILE_FAST = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
  "--xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
  COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"
_OURS = f"--xla_force_host_platform_device_count=8 {COMPILE_FAST}"
if _OURS not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_OURS}"
# Much is compiled again and again: all tests, workers and scripts share one
# cache. launch/test.sh keeps it from run to run; without it, it ends with them.
_CACHE = "RLJAX_TEST_CACHE"
_OWN_CACHE = None
if _CACHE not in os.environ:  # Else a worker of a run that has made it.
  _OWN_CACHE = os.environ[_CACHE] = tempfile.mkdtemp(prefix="rljax-cache-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import chex  # noqa: F401, its flags stay when those of a script go.
import hypothesis
import jax
import pytest

jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE])
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


# Further cases of tests, which are slow ones: the quick run has their siblings.
FURTHER = (
  "experiments/offline_test.py::OfflineTest::test_killed_run_ends_with_the_same_bits1",
  "experiments/packing_test.py::PackedLengthTest::test_learns_the_same1",
  "experiments/resume_test.py::ResumeTest::test_killed_run_ends_with_the_same_bits1",
  "experiments/rlmec_test.py::PipelineTest::test_killed_and_resumed_is_the_same1",
  "experiments/rlmec_test.py::RewardModelTest::test_killed_and_resumed_is_the_same1",
  "generation/packed_test.py::PackedTest::test_loss_and_gradient3",
  "generation/packed_test.py::PackedTest::test_loss_and_gradient4",
  "generation/packed_test.py::PackedTest::test_loss_and_gradient5",
  "generation/slots_test.py::SamplersTest::test_responder1",
  "generation/slots_test.py::SamplersTest::test_sampler2",
  "generation/slots_test.py::SamplersTest::test_sampler3",
  "generation/slots_test.py::SlotsTest::test_caches1",
  "models/lora_test.py::AdaptedTest::test_beside_is_merged2",
  "models/lora_test.py::AdaptedTest::test_beside_is_merged3",
  "models/lora_test.py::AdaptedTest::test_beside_is_merged4",
  "models/lora_test.py::AdaptedTest::test_beside_is_merged5",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Marks cases that a mark above their parameters would miss."""
  for item in items:
    if item.nodeid.removeprefix("tests/") in FURTHER:
      item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _without_programs():
  """Drops what a module has traced and compiled: gigabytes in a whole run."""
  yield
  jax.clear_caches()


def pytest_unconfigure():
  """Removes the cache of compiled programs, if this process has made it."""
  if _OWN_CACHE:
    shutil.rmtree(_OWN_CACHE, ignore_errors=True)

"""Machines that programs are compiled for without being there.

A target is a name such as `v5e:2x4` (a slice by its chips), `v5e-8`, `v6e-16`,
`v5p-8` (as Google names its machines), `h100:8` (GPUs of one host) or `cpu:8`
(simulated devices). TPUs need libtpu (`pip install "jax[tpu]"`), GPUs need the
wheels jax-cuda12-plugin, jax-cuda12-pjrt, nvidia-cuda-nvcc-cu12 and
nvidia-cuda-runtime-cu12, but no driver.
"""

import dataclasses
import os
import re
import sys
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the maker says that one device can do.

  Attributes:
    memory: bytes; 0: not known, everything fits.
    flops: bfloat16 operations of products in a second; 0: not known.
    bandwidth: bytes of main memory in a second.
    links: bytes that it sends to other devices in a second, over all links.
    usable: share of the memory that programs get.
  """

  memory: float = 0.0
  flops: float = 0.0
  bandwidth: float = 0.0
  links: float = 0.0
  usable: float = 1.0


# TPUs: cloud.google.com/tpu/docs/v5e, /v5p, /v6e, /tpu7x, by device: a chip of
# tpu7x is two. GPUs: data sheets of the SXM boards without sparsity; NVLink in
# one direction. JAX takes three quarters of a GPU's memory unless
# XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
CHIPS = {
  "v5e": Chip(16 * 2**30, 197e12, 819e9, 100e9),
  "v5p": Chip(95 * 2**30, 459e12, 2765e9, 300e9),
  "v6e": Chip(32 * 2**30, 918e12, 1640e9, 224e9),
  "tpu7x": Chip(96 * 2**30, 1153e12, 3690e9, 300e9),
  "a100": Chip(80e9, 312e12, 2039e9, 300e9, 0.75),
  "h100": Chip(80e9, 989e12, 3350e9, 450e9, 0.75),
  "h200": Chip(141e9, 989e12, 4800e9, 450e9, 0.75),
  "b200": Chip(180e9, 2250e12, 8000e9, 900e9, 0.75),
  "cpu": Chip(),
}
_TPUS = ("v5e", "v5p", "v6e", "tpu7x")
# Chips -> slice, of the flat and of the cubic kinds.
_FLAT = {
  **{1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"},
  **{128: "8x16", 256: "16x16"},
}
_CUBIC = {
  **{4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"},
  **{128: "4x4x8", 256: "4x8x8"},
}
# GpuTargetConfigProto: what the compiler asks a GPU for.
_GPU = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
_GPUS = {
  "a100": {
    **{"shared": 167936, "cores": 108, "fpus": 64, "cache": 41943040},
    **{"clock": 1.41, "optin": 166912, "major": 8, "name": "A100"},
  },
  "h100": {
    **{"shared": 233472, "cores": 132, "fpus": 128, "cache": 52428800},
    **{"clock": 1.98, "optin": 232448, "major": 9, "name": "H100"},
  },
  "h200": {
    **{"shared": 233472, "cores": 132, "fpus": 128, "cache": 52428800},
    **{"clock": 1.98, "optin": 232448, "major": 9, "name": "H200"},
  },
  "b200": {
    **{"shared": 233472, "cores": 148, "fpus": 128, "cache": 132644864},
    **{"clock": 1.965, "optin": 232448, "major": 10, "name": "B200"},
  },
}


@dataclasses.dataclass(frozen=True)
class Target:
  """A machine to plan for.

  Attributes:
    name: as it was given.
    kind: one of `CHIPS`.
    topology: of the slice, for a TPU; else "".
    num_devices: in all.
  """

  name: str
  kind: str
  topology: str
  num_devices: int

  @property
  def chip(self) -> Chip:
    """What one device can do."""
    return CHIPS[self.kind]


def parse(name: str) -> Target:
  """Reads the name of a target.

  Raises:
    ValueError: if there is no such target; the message says what there is.
  """
  match = re.fullmatch(r"([a-z0-9]+)(?:([:-])([0-9x]+))?", name.lower())
  kind = match and {"v5litepod": "v5e"}.get(match[1], match[1])
  if kind not in CHIPS:
    raise ValueError(
      f"--target={name} is none of {', '.join(CHIPS)}, with a size behind it, "
      "such as v5e:2x4, v6e-16, v5p-8, h100:8 or cpu:8."
    )
  separator, size = match[2], match[3] or "1"
  if kind not in _TPUS:
    if not size.isdecimal() or int(size) < 1:
      raise ValueError(
        f"--target={name}: the number of devices must be positive, as in "
        f"{kind}:8."
      )
    return Target(name, kind, "", int(size))
  is_flat = kind in ("v5e", "v6e")
  slices = _FLAT if is_flat else _CUBIC
  if size.isdecimal():
    # The machines of v5p are named by cores, two on a chip.
    cores = 2 if kind == "v5p" and separator == "-" else 1
    chips = int(size) // cores
    if int(size) % cores or chips not in slices:
      known = ", ".join(f"{kind}{separator or ':'}{n * cores}" for n in slices)
      raise ValueError(f"--target={name} is no slice; there are {known}.")
    size = slices[chips]
  sizes = [int(n) for n in size.split("x") if n]
  if len(sizes) != (2 if is_flat else 3) or min(sizes) < 1:
    known = ", ".join(f"{kind}:{x}" for x in slices.values())
    raise ValueError(f"--target={name} is no slice; there are {known}.")
  chips = 1
  for n in sizes:
    chips *= n
  return Target(name, kind, size, chips * (2 if kind == "tpu7x" else 1))


def prepare(target: Target) -> None:
  """Sets what JAX reads when it starts: no accelerator of this host is used.

  Call it before anything asks JAX for devices.
  """
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_WORKER_ID", "0")
  if target.kind == "cpu":
    flag = f"--xla_force_host_platform_device_count={target.num_devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
  if "jax" in sys.modules:
    import jax

    jax.config.update("jax_platforms", "cpu")


def devices(target: Target) -> list[Any]:
  """Returns the devices of a target, which hold nothing.

  Raises:
    ValueError: if what compiles for them is not installed, or a machine of
      such a size does not exist.
  """
  import jax
  from jax.experimental import topologies

  if target.kind == "cpu":
    found = jax.devices("cpu")
    if len(found) < target.num_devices:
      raise ValueError(
        f"--target={target.name} needs {target.num_devices} simulated devices, "
        f"and this process has {len(found)}; start it anew with XLA_FLAGS="
        f"--xla_force_host_platform_device_count={target.num_devices}."
      )
    return found[: target.num_devices]
  if target.kind in _TPUS:
    platform, name, more = "tpu", f"{target.kind}:{target.topology}", {}
    needs = 'pip install "jax[tpu]"'
    # It guards a device, which there is none of: plans may run side by side.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if target.topology == "1x1":
      more = {"chips_per_host_bounds": (1, 1, 1), "num_slices": 1}
  else:
    platform, name = "cuda", ""
    chip, sizes = target.chip, _GPUS[target.kind]
    text = _GPU.format(
      memory=int(chip.memory), bandwidth=int(chip.bandwidth), **sizes
    )
    more = {"topology": f"1x1x{target.num_devices}", "target_config": text}
    needs = (
      "pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt (of the version "
      f"of jax, {jax.__version__}) nvidia-cuda-nvcc-cu12 "
      "nvidia-cuda-runtime-cu12"
    )
  jax.devices("cpu")  # Registers the plugins that are installed.
  try:
    found = topologies.get_topology_desc(name, platform=platform, **more)
  except Exception as error:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    raise ValueError(
      f"--target={target.name}: nothing here compiles for it ({reason}); "
      f"{needs} does, without a device."
    ) from error
  return list(found.devices)

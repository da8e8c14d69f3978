"""Processes that find each other by what a cluster tells jax."""

import os
import socket
import subprocess
import sys
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from rljax.distributed import launchers, processes
from tests.distributed import processes_test

JOB = (
  "from rljax.distributed import processes; processes.join(); import jax; "
  "print('found', processes.exchange(jax.process_index()), flush=True)"
)
SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[03-04],other07",
  "SLURM_STEP_NUM_NODES": "2",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}


class DetectedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    kept = {
      name: value
      for name, value in os.environ.items()
      if not name.startswith(("RLJAX_", "SLURM_", "OMPI_", "KUBERNETES_"))
    }
    self.enter_context(mock.patch.dict(os.environ, kept, clear=True))

  def test_open_mpi_joins_two_processes(self):
    with socket.create_server(("127.0.0.1", 0)) as server:
      port = server.getsockname()[1]
    started = [
      subprocess.Popen(
        [sys.executable, "-c", JOB],
        cwd=processes_test.ROOT,
        env=processes_test.environment(
          OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://127.0.0.1:34911",
          OMPI_COMM_WORLD_SIZE="2",
          OMPI_COMM_WORLD_RANK=str(rank),
          OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
          OMPI_COMM_WORLD_LOCAL_SIZE="2",
          JAX_COORDINATOR_PORT=str(port),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for rank in range(2)
    ]
    for process in started:
      self.addCleanup(process.kill)
    for process in started:
      self.assertIn("found [0, 1]", process.communicate(timeout=300)[0])

  @parameterized.parameters(
    ({}, None),  # One process on each host has all of its devices.
    ({"SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_PROCID": "3"}, [1]),
  )
  def test_slurm(self, changes, device_ids):
    with (
      mock.patch.dict(os.environ, SLURM | changes),
      mock.patch.object(jax.distributed, "initialize") as initialize,
      mock.patch.object(sys, "excepthook"),
    ):
      processes.join()
    settings = SLURM | changes
    coordinator, num, index, found = initialize.call_args.args
    self.assertStartsWith(coordinator, "node03:")
    self.assertEqual(num, int(settings["SLURM_NTASKS"]))
    self.assertEqual(index, int(settings["SLURM_PROCID"]))
    self.assertEqual(found, device_ids)

  @parameterized.parameters(
    {"OMPI_COMM_WORLD_SIZE": "2"},
    {"TPU_WORKER_HOSTNAMES": "a,b"},
    {"SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2"},
  )
  def test_nobody_trains_apart(self, **variables):
    with (
      mock.patch.dict(os.environ, variables),
      mock.patch.object(jax.distributed, "initialize") as initialize,
    ):
      with self.assertRaisesRegex(
        ValueError, "one of 2 processes.*jax finds no coordinator.*train alone"
      ):
        processes.join()
      with self.assertRaisesRegex(ValueError, "runs in one process"):
        processes.check_joined()
    initialize.assert_not_called()

  @parameterized.parameters(
    {},
    {"SLURM_NTASKS": "2"},  # The script of a job, not a step of it.
    {"TPU_WORKER_HOSTNAMES": "localhost"},
    {"OMPI_COMM_WORLD_SIZE": "1"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
  )
  def test_one_process(self, **variables):
    with (
      mock.patch.dict(os.environ, variables),
      mock.patch.object(jax.distributed, "initialize") as initialize,
    ):
      processes.join()
      processes.check_joined()
    initialize.assert_not_called()
    self.assertEqual(launchers.num_started(variables), 1)


if __name__ == "__main__":
  absltest.main()

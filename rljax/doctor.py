"""Checks the devices and processes of a run: python -m rljax.doctor --help."""

import sys

from rljax.distributed import doctor

if __name__ == "__main__":
  sys.exit(doctor.main())

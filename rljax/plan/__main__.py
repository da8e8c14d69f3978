"""Plans a script for a machine: python -m rljax.plan --help."""

import sys

from rljax.plan import command

if __name__ == "__main__":
  sys.exit(command.main(sys.argv[1:]))

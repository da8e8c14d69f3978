"""Runs a script that ends itself with -9 as it uploads an object.

  python -m tests.killed_upload experiments/sft.py PATTERN WHEN FLAGS...

PATTERN is searched in the names of objects; WHEN is "before" or "after" the
first that has it is written.
"""

import os
import re
import runpy
import signal
import sys

from rljax.storage import buckets

script, pattern, when = sys.argv[1:4]
write = buckets.Bucket.write


def killed(bucket, name, content):
  if not re.search(pattern, name):
    return write(bucket, name, content)
  if when == "after":
    write(bucket, name, content)
  os.kill(os.getpid(), signal.SIGKILL)


buckets.Bucket.write = killed
sys.argv = [script, *sys.argv[4:]]
runpy.run_path(script, run_name="__main__")

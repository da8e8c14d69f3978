"""Tests of what scripts check of their flags."""

from absl import flags
from absl.testing import absltest

from rljax import cli

READS = {"dpo": ("beta", "smooth"), "pro": (), "simpo": ("beta",)}


def _flags(*arguments):
  values = flags.FlagValues()
  flags.DEFINE_enum("algorithm", "dpo", list(READS), "", values)
  flags.DEFINE_float("beta", None, "", flag_values=values)
  flags.DEFINE_bool("smooth", False, "", flag_values=values)
  flags.DEFINE_integer("steps", 3, "", flag_values=values)
  values(["script", *arguments])
  return values


class CheckReadTest(absltest.TestCase):
  def test_flags_that_are_read(self):
    for arguments in (
      (),
      ("--beta=1", "--smooth"),
      ("--algorithm=simpo", "--beta=2"),
      # What no method names is read by all, and defaults are no choice.
      ("--algorithm=pro", "--steps=4", "--nosmooth"),
    ):
      cli.check_read(_flags(*arguments), "algorithm", READS)

  def test_flags_that_are_not(self):
    for arguments, message in (
      (
        ("--algorithm=pro", "--beta=1"),
        "--beta=1.0 belongs to --algorithm=dpo or simpo; leave it out for pro",
      ),
      (
        ("--algorithm=simpo", "--smooth", "--beta=1"),
        "--smooth=True belongs to --algorithm=dpo; leave it out for simpo",
      ),
    ):
      with self.assertRaisesRegex(ValueError, message):
        cli.check_read(_flags(*arguments), "algorithm", READS)


if __name__ == "__main__":
  absltest.main()

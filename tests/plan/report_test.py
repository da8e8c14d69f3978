"""Memory, times and verdicts from numbers that are known."""

import dataclasses

from absl.testing import absltest

from rljax.plan import report, targets

GB = 1e9
ROW = report.ProgramRow(
  name="sample",
  seconds=1.0,
  memory={
    **{"argument": GB, "temporary": 2 * GB, "output": 0, "alias": 0, "code": 0}
  },
  beside=3 * GB,
  peak=6 * GB,
  flops=0.0,
  token_flops=100 * 197e12,
  traffic=0.0,
  token_traffic=100 * 819e9,
  sent=0.0,
  token_sent=100 * 50e9,
  rounds=100,
  collectives={"all-reduce at depth 1": [100.0, GB]},
  traffic_by={"products": GB},
  calls=1,
  error="",
  warnings=[],
)
LEARN = dataclasses.replace(
  ROW,
  name="learn",
  flops=8 * 197e12,
  token_flops=0.0,
  traffic=819e9 / 2,
  token_traffic=0.0,
  token_sent=0.0,
  rounds=0,
  peak=10 * GB,
)


class SummaryTest(absltest.TestCase):
  def test_times_by_hand(self):
    """Four devices of 197e12 operations and 819e9 bytes a second."""
    found = report.summarise(targets.parse("v5e-4"), [ROW, LEARN], tokens=800)
    self.assertTrue(found.fits)
    self.assertEqual((found.program, found.peak), ("learn", 10 * GB))
    # A round: a quarter of a second of products, one of memory, half of links.
    step = found.decode_step
    self.assertAlmostEqual(step.products, 0.25)
    self.assertAlmostEqual(step.memory, 1.0)
    self.assertAlmostEqual(step.links, 0.5)
    self.assertEqual(step.bound, "memory")
    self.assertEqual(found.update.bound, "products")
    self.assertAlmostEqual(found.update.seconds, 2.0)
    self.assertAlmostEqual(found.step, 102.0)
    self.assertAlmostEqual(found.mfu, 108 / (102 * 4))
    text = report.text(targets.parse("v5e-4"), [ROW, LEARN], found)
    self.assertIn("fits: 10.00 GB of 17.18 GB on a device, in learn", text)
    self.assertIn("decode step, at least: 1 s, bound by memory", text)
    self.assertIn("8 response tokens a second, MFU 26.5% at most", text)

  def test_what_does_not_fit(self):
    large = dataclasses.replace(LEARN, peak=20 * GB)
    target = targets.parse("v5e-4")
    found = report.summarise(target, [ROW, large], tokens=0)
    self.assertFalse(found.fits)
    self.assertIn("DOES NOT FIT: 20.00 GB", report.text(target, [large], found))
    refused = dataclasses.replace(LEARN, error="Ran out of memory", memory={})
    found = report.summarise(target, [ROW, refused], tokens=0)
    self.assertFalse(found.fits)
    text = report.text(target, [refused], found)
    self.assertIn("DOES NOT FIT: Ran out of memory", text)

  def test_a_gpu_keeps_a_quarter(self):
    large = dataclasses.replace(LEARN, peak=61 * GB)
    self.assertFalse(
      report.summarise(targets.parse("h100:1"), [large], tokens=0).fits
    )

  def test_unknown_machines_have_no_times(self):
    found = report.summarise(targets.parse("cpu:8"), [ROW], tokens=10)
    self.assertTrue(found.fits)
    self.assertIsNone(found.step)

  def test_nothing_was_compiled(self):
    with self.assertRaisesRegex(ValueError, "compiled nothing"):
      report.summarise(targets.parse("cpu:8"), [], tokens=10)


class ExtrapolateTest(absltest.TestCase):
  def test_line_through_two_depths(self):
    deep = dataclasses.replace(
      ROW,
      beside=4 * GB,
      peak=8 * GB,
      memory={**ROW.memory, "argument": 1.5 * GB},
      collectives={"all-reduce at depth 1": [150.0, 2 * GB]},
    )
    found = report.extrapolate(ROW, deep, (2, 4), 24)
    self.assertAlmostEqual(found.beside, 14 * GB)
    self.assertAlmostEqual(found.peak, 28 * GB)
    self.assertAlmostEqual(found.memory["argument"], 6.5 * GB)
    self.assertEqual(found.memory["temporary"], 2 * GB)
    number, size = found.collectives["all-reduce at depth 1"]
    self.assertAlmostEqual(number, 650.0)
    self.assertAlmostEqual(size, 12 * GB)
    self.assertEqual((found.rounds, found.calls), (100, 1))


if __name__ == "__main__":
  absltest.main()

"""Tests of the arms of a comparison: labels, seeds, references, runs."""

import json
import pathlib
import tempfile

from absl.testing import parameterized

from rljax.evaluation import arms
from rljax.text import logged


class ReadTest(parameterized.TestCase):
  def test_labels_and_seeds(self):
    # The second seed of ppo comes behind another arm, and next to the first.
    found = arms.read(["start=runs/sft", "ppo=a", "hub/name", "ppo=b"])
    self.assertEqual(
      found,
      [
        arms.Seed("start", 0, "runs/sft", ""),
        arms.Seed("ppo", 0, "a", ""),
        arms.Seed("ppo", 1, "b", ""),
        arms.Seed("hub/name", 0, "hub/name", ""),
      ],
    )
    # The last equals sign counts: labels may have some.
    (seed,) = arms.read(["β=0.1=runs/x"])
    self.assertEqual((seed.label, seed.model), ("β=0.1", "runs/x"))

  def test_references(self):
    policies = ["a=1", "a=2", "b=3", "b=4"]
    references = lambda *names: [
      seed.reference for seed in arms.read(policies, names)
    ]
    self.assertEqual(references(), [""] * 4)
    self.assertEqual(references("r"), ["r"] * 4)
    self.assertEqual(references("r", "s"), ["r", "s", "r", "s"])
    with self.assertRaisesRegex(
      ValueError, "--reference names 2 models, and b has 1 seeds"
    ):
      arms.read(["a=1", "a=2", "b=3"], ["r", "s"])

  def test_models_once_each(self):
    seeds = arms.read(["a=1", "a=2", "b=1"], ["2"])
    self.assertEqual(arms.models(seeds), ["1", "2"])
    self.assertEqual(arms.models(arms.read(["a=1"])), ["1"])

  @parameterized.parameters(
    ([], "names no model"),
    (["=x"], "got '=x' without a label or without a model"),
    (["a=1", "b="], "got 'b='"),
  )
  def test_bad_input(self, policies, message):
    with self.assertRaisesRegex(ValueError, message):
      arms.read(policies)

  def test_file_names(self):
    seeds = arms.read(["a b/c=1", "a b/c=2", "x.y-z=3"])
    arms.check_file_names(seeds)
    self.assertEqual(
      [seed.file_name for seed in seeds], ["a_b_c-0", "a_b_c-1", "x.y-z-0"]
    )
    with self.assertRaisesRegex(ValueError, "labels a b, a/b would share"):
      arms.check_file_names(arms.read(["a b=1", "a/b=2"]))


class PromptsTest(parameterized.TestCase):
  def test_same_rows(self):
    rows = logged.from_prompts("abc", "here")
    arms.check_same_rows("x", rows, None)
    # The texts may differ, as those of two chat templates do.
    arms.check_same_rows("x", rows, logged.from_prompts("ABC", "here"))
    for others in (rows[1:], rows[::-1]):
      with self.assertRaisesRegex(
        ValueError, "runs/x was left 3 prompts .* --too_long=cut"
      ):
        arms.check_same_rows("runs/x", rows, others)

  def test_repeated_prompts_are_noted(self):
    self.assertEqual(arms.notes(["a", "b"]), [])
    (note,) = arms.notes(["a", "b", "a"])
    self.assertIn("2 of 3 prompts are different", note)


class RunsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def run_of(self, name, rows):
    workdir = self.folder / name
    workdir.mkdir()
    text = "".join(
      json.dumps({"step": i} | r) + "\n" for i, r in enumerate(rows)
    )
    (workdir / "metrics.jsonl").write_text(text)
    return workdir

  def test_runs_that_logged_rewards(self):
    ppo = [self.run_of(f"ppo{i}", [{"reward/mean": i}]) for i in range(2)]
    offline = self.run_of("offline", [{"dev/reward": 1.0}])
    sft = self.run_of("sft", [{"nll/loss": 1.0}])
    found = arms.histories(
      arms.read(
        [
          f"ppo={ppo[0]}",
          f"ppo={ppo[1]}/",
          f"a_lol={offline}/best",
          f"sft={sft}",
          f"mixed={ppo[0]}",
          f"mixed={sft}",
          "hub=org/name",
        ]
      )
    )
    self.assertEqual(
      {label: list(map(pathlib.Path, x)) for label, x in found.items()},
      {
        "ppo": [workdir / "metrics.jsonl" for workdir in ppo],
        "a_lol": [offline / "metrics.jsonl"],
      },
    )

  def test_last_steps(self):
    first = self.run_of("a", [{"reward/mean": x} for x in (9.0, 1.0, 2.0)])
    rows = [{"reward/mean": x, "answers/distinct": 7} for x in (9.0, 3.0, 4.0)]
    second = self.run_of("b", rows)
    other = self.run_of("c", [{"dev/reward": 1.0}])
    paths = {
      "ppo": [first / "metrics.jsonl", second / "metrics.jsonl"],
      "one": [second / "metrics.jsonl"],
      "offline": [other / "metrics.jsonl"],
    }
    # Of the last two steps: 1.5 and 3.5. One seed alone has counted answers,
    # and the last arm has logged nothing of all this.
    self.assertEqual(
      arms.tails(paths, num_steps=2),
      {
        "ppo": {
          "reward": "2.500 [1.500, 3.500]",
          "answers in a batch": "7.000",
        },
        "one": {"reward": "3.500", "answers in a batch": "7.000"},
      },
    )

"""Tests of the stages of a pipeline."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized

from rljax.storage import stages
from tests import conftest


class StageTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.workdir = pathlib.Path(folder.name)
    self.notes = []

  def stage(self, name="samples", **inputs):
    return stages.Stage(self.workdir, name, inputs, self.notes.append)

  def test_same_inputs_find_the_finished_stage(self):
    first = self.stage(seed=1, limits=(2, 3))
    self.assertIsNone(first.facts)
    first.finish(rows=5)
    second = self.stage(limits=[2, 3], seed=1)
    self.assertEqual(second.facts["rows"], 5)
    self.assertEmpty(self.notes)

  def test_another_process_makes_it(self):
    """Only one that is finished may be opened by several."""
    first = self.stage(seed=1)
    program = (
      "import sys\nfrom rljax.storage import stages\n"
      "facts = stages.Stage(sys.argv[1], 'samples', {'seed': int(sys.argv[2])})"
      ".facts\nprint(facts and facts['rows'])"
    )

    def other(seed):
      return subprocess.run(
        [sys.executable, "-c", program, self.workdir, str(seed)],
        cwd=conftest.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
      )

    for seed in (1, 2):  # Neither written to nor set aside.
      self.assertRegex(
        other(seed).stderr,
        f"samples is being written by process {os.getpid()} on ",
      )
    self.assertTrue(first.folder.exists())
    first.finish(rows=5)
    self.assertEqual(other(1).stdout, "5\n")
    self.assertEqual(os.listdir(self.workdir), ["samples"])

  def test_a_stopped_stage_goes_on_with_its_files(self):
    pathlib.Path(self.stage(seed=1).path("rows.jsonl")).write_text("{}\n")
    again = self.stage(seed=1)
    self.assertIsNone(again.facts)
    self.assertEqual(pathlib.Path(again.path("rows.jsonl")).read_text(), "{}\n")

  @parameterized.parameters(
    ({"seed": 2}, "seed"), ({"seed": 1, "more": 0}, "more"), ({}, "seed")
  )
  def test_other_inputs_begin_anew_and_keep_what_was_there(self, other, name):
    first = self.stage(seed=1)
    pathlib.Path(first.path("rows.jsonl")).write_text("old\n")
    first.finish(rows=5)
    second = self.stage(**other)
    self.assertIsNone(second.facts)
    self.assertFalse(pathlib.Path(second.path("rows.jsonl")).exists())
    aside = self.workdir / "samples.old1"
    self.assertEqual((aside / "rows.jsonl").read_text(), "old\n")
    self.assertLen(self.notes, 1)
    self.assertIn(f"samples: {name} changed", self.notes[0])
    self.assertIn(str(aside), self.notes[0])

  def test_older_results_are_not_overwritten(self):
    for seed in range(3):
      stage = self.stage(seed=seed)
      pathlib.Path(stage.path("rows.jsonl")).write_text(f"{seed}")
    found = [
      (self.workdir / f"samples.old{i}" / "rows.jsonl").read_text()
      for i in (1, 2)
    ]
    self.assertEqual(found, ["0", "1"])

  def test_an_edited_output_has_another_digest(self):
    stage = self.stage(seed=1)
    path = pathlib.Path(stage.path("rows.jsonl"))
    path.write_text("one\n")
    stage.finish()
    before = stage.digest("rows.jsonl")
    self.assertEqual(self.stage(seed=1).digest("rows.jsonl"), before)
    path.write_text("two\n")
    self.assertNotEqual(self.stage(seed=1).digest("rows.jsonl"), before)

  def test_digest_tells_files_apart(self):
    stage = self.stage()
    for name, text in (("a", "xy"), ("b", "z"), ("c", "x"), ("d", "yz")):
      pathlib.Path(stage.path(name)).write_text(text)
    stage.finish()
    self.assertNotEqual(stage.digest("a", "b"), stage.digest("c", "d"))
    self.assertNotEqual(stage.digest("a", "b"), stage.digest("b", "a"))

  def test_digest_needs_a_finished_stage_and_its_files(self):
    stage = self.stage()
    with self.assertRaisesRegex(ValueError, "samples is not finished"):
      stage.digest("rows.jsonl")
    stage.finish()
    with self.assertRaisesRegex(
      ValueError, "rows.jsonl cannot be read.*delete"
    ):
      stage.digest("rows.jsonl")

  @parameterized.parameters("", "{", "[]")
  def test_foreign_folders_are_refused(self, text):
    folder = self.workdir / "samples"
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    if text:
      (folder / "inputs.json").write_text(text)
    with self.assertRaisesRegex(
      ValueError, "is not a folder of the stage samples"
    ):
      self.stage(seed=1)
    self.assertEqual((folder / "mine.txt").read_text(), "precious")

  def test_an_empty_folder_is_taken(self):
    (self.workdir / "samples").mkdir()
    self.assertIsNone(self.stage(seed=1).facts)

  def test_a_kill_at_the_very_start_leaves_a_folder_to_go_on_in(self):
    folder = self.workdir / "samples"
    folder.mkdir()
    (folder / ".inputs.json.partial").write_text("{")
    self.assertIsNone(self.stage(seed=1).facts)
    self.assertEmpty(self.notes)

  def test_a_half_written_end_is_no_end(self):
    stage = self.stage(seed=1)
    stage.finish(rows=5)
    path = self.workdir / "samples" / "done.json"
    path.write_text(path.read_text()[:4])
    self.assertIsNone(self.stage(seed=1).facts)

  def test_inputs_can_be_read(self):
    self.stage(seed=1)
    text = (self.workdir / "samples" / "inputs.json").read_text()
    self.assertEqual(json.loads(text), {"seed": 1})


class RoundsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.workdir = pathlib.Path(folder.name)

  def test_rounds_are_finished_one_after_another(self):
    rounds = stages.Rounds(self.workdir)
    self.assertEqual(rounds.finished, [])
    self.assertFalse((self.workdir / "rounds").exists())
    rounds.finish(round=0, score=0.5)
    path = pathlib.Path(rounds.path(1, "samples.jsonl"))
    self.assertEqual(path, self.workdir / "rounds" / "1" / "samples.jsonl")
    path.parent.mkdir()
    path.write_text("{}\n")
    rounds.finish(round=1, score=0.25, names=("a", "b"))
    self.assertEqual(path.read_text(), "{}\n")
    expected = [
      {"round": 0, "score": 0.5},
      # As a later start reads it.
      {"round": 1, "score": 0.25, "names": ["a", "b"]},
    ]
    self.assertEqual(rounds.finished, expected)
    self.assertEqual(stages.Rounds(self.workdir).finished, expected)
    found = json.loads((path.parent / "round.json").read_text())
    self.assertEqual(found, expected[1])

  def test_a_round_without_an_end_is_none(self):
    rounds = stages.Rounds(self.workdir)
    rounds.finish(round=0)
    rounds.finish(round=1)
    path = self.workdir / "rounds/1/round.json"
    path.write_text(path.read_text()[:-3])  # As no kill leaves it.
    self.assertLen(stages.Rounds(self.workdir).finished, 1)
    path.unlink()
    self.assertLen(stages.Rounds(self.workdir).finished, 1)

  def test_best_is_the_first_of_several(self):
    rounds = stages.Rounds(self.workdir)
    for number, score in enumerate((0.25, 0.5, 0.5, 0.125)):
      rounds.finish(round=number, score=score)
    self.assertEqual(rounds.best("score"), 1)
    self.assertEqual(rounds.best("round"), 3)

  def test_one_process_reads_and_writes(self):
    told = [[{"round": 0}], {"round": 1, "rows": 5}]
    rounds = stages.Rounds(self.workdir, once=lambda _: told.pop(0))
    rounds.finish(round=1, rows=4)  # The first process said 5.
    self.assertEqual(rounds.finished, [{"round": 0}, {"round": 1, "rows": 5}])
    self.assertEmpty(list(self.workdir.iterdir()))


class DiscardUnlessTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name, "samples", "a.jsonl")
    self.notes = []

  def look(self, **made_of):
    stages.set_aside_unless(self.path, made_of, self.notes.append)

  def test_a_file_of_the_same_stays(self):
    self.look(seed=1, stop_strings=("a", "b"))
    manifest = json.loads((self.path.parent / "a.json").read_text())
    self.assertEqual(manifest, {"seed": 1, "stop_strings": ["a", "b"]})
    self.path.write_text("rows\n")
    self.look(stop_strings=["a", "b"], seed=1)
    self.assertEqual(self.path.read_text(), "rows\n")
    self.assertEmpty(self.notes)

  @parameterized.parameters("{}", '{"seed": 2}', '{"seed": 1', None)
  def test_a_file_of_something_else_is_set_aside(self, manifest):
    self.path.parent.mkdir()
    self.path.write_text("rows\n")
    if manifest is not None:
      (self.path.parent / "a.json").write_text(manifest)
    self.look(seed=1)
    self.assertFalse(self.path.exists())
    self.assertIn("a.jsonl is of another policy", self.notes[0])
    aside = self.path.with_name("a.jsonl.old1")
    self.assertIn("is now a.jsonl.old1", self.notes[0])
    self.assertEqual(aside.read_text(), "rows\n")
    found = json.loads((self.path.parent / "a.json").read_text())
    self.assertEqual(found, {"seed": 1})


if __name__ == "__main__":
  absltest.main()

"""Tests of what several samples of each prompt are like."""

from absl.testing import absltest

from rljax.evaluation import answers


def _row(prompt, response, is_correct, finished=True, value=0):
  parts = {"is_correct": is_correct, "steps": value, "answer": response}
  return {
    "prompt": prompt,
    "response": response,
    "finished": finished,
    "parts": parts,
  }


class OfSeveralTest(absltest.TestCase):
  def test_hand_computed(self):
    rows = [
      _row("q", "a b", True, value=3),
      _row("q", "a  b", True),
      _row("q", "c", True),
      _row("r", "a b", False, value=1),
      # Right, and without an end: such a row is wrong.
      _row("r", "d", True, finished=False),
      _row("s", "a b", True),
    ]
    self.assertEqual(
      answers.of_several(rows, num_prompts=4),
      {
        "samples/steps": 4 / 6,
        "samples/is_correct": 4 / 6,
        "samples/finished": 5 / 6,
        # q and s of four; "a b" and "c" of q, and "a b" of s.
        "samples/solved": 2 / 4,
        "samples/distinct_traces": 3 / 4,
      },
    )
    found = answers.of_several(rows[:1], num_prompts=1, prefix="x/")
    self.assertEqual(found["x/is_correct"], 1.0)


if __name__ == "__main__":
  absltest.main()

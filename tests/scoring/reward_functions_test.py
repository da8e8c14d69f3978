"""Reward functions of a user's own: what they are given, and may return."""

import os
import pathlib
import tempfile
import textwrap

import numpy as np
from absl.testing import absltest, parameterized

from rljax.scoring import reward_functions, scorers
from rljax.text import asked

SOURCE = """
import time

def length(prompts, responses, **columns):
  print("seen by nobody's standard output")
  return [len(text) for text in responses]

def right(responses, answer):
  return [
    None if gold is None else (text == gold, {"is_correct": text == gold})
    for text, gold in zip(responses, answer)
  ]

# As TRL has them: every completion of messages is a list of messages.
def trl(completions, solution, **kwargs):
  assert "responses" not in kwargs and "prompts" in kwargs
  return [
    1.0 if completion[0]["content"] == wanted else None
    for completion, wanted in zip(completions, solution)
  ]

def plain_trl(completions, **kwargs):
  return [float(len(completion)) for completion in completions]

async def later(responses):
  return [1.0] * len(responses)

def sleeps(responses):
  for text in responses:
    time.sleep(30 if text == "slow" else 0)
  return [1.0] * len(responses)

def raises(responses):
  return [1 / len(text) for text in responses]

def dies(responses):
  import os
  if "kill" in responses:
    os._exit(3)
  return [0.0] * len(responses)

def few(responses):
  return [1.0]

def a_text(responses):
  return "1" * len(responses)

def nan(responses):
  return [float("nan")] * len(responses)

def odd_pair(responses):
  return [(1.0, 2.0)] * len(responses)

def of_a_trainer(completions, completion_ids, **kwargs):
  return [0.0] * len(completions)

def needs(responses, gold):
  return [0.0] * len(responses)

numbers = lambda responses: __import__("numpy").arange(len(responses))
column = lambda responses: numbers(responses)[:, None]
row = lambda responses: numbers(responses)[None]
lists = lambda responses: [[float(i)] for i, _ in enumerate(responses)]
decimals = lambda responses: [
  __import__("decimal").Decimal(i) for i, _ in enumerate(responses)
]

class Tensor:
  def __init__(self, values):
    self.values = values
  def tolist(self):
    return self.values

tensor = lambda responses: Tensor(list(range(len(responses))))

def without_end(responses):
  while True:
    yield 1.0

def huge(responses):
  return [10**5000] * len(responses)

def forks(responses):
  import os
  child = os.fork()
  if child:
    os.waitpid(child, 0)
  return [0.0 if child else 9.0] * len(responses)
"""


class ParseTest(parameterized.TestCase):
  def test_weights_and_names(self):
    found = reward_functions.parse(
      ["a/b.py:length", "package.module:style*0.5", "b.py:other*-1e-2"]
    )
    self.assertEqual(
      [(r.source, r.function, r.weight, r.name) for r in found],
      [
        ("a/b.py", "length", 1.0, "length"),
        ("package.module", "style", 0.5, "style"),
        ("b.py", "other", -0.01, "other"),
      ],
    )

  def test_equal_functions_are_named_by_their_files(self):
    found = reward_functions.parse(["a.py:f", "x/b.py:f", "b.py:g"])
    self.assertEqual([r.name for r in found], ["a.f", "b.f", "g"])

  @parameterized.parameters(
    "a.py", "a.py:", ":f", "a.py:f*", "a.py:f*x", "a.py:f*nan", "a.py:1f", ""
  )
  def test_other_forms_are_refused(self, spec):
    with self.assertRaisesRegex(ValueError, "file.py:function"):
      reward_functions.parse([spec])

  def test_twice(self):
    with self.assertRaisesRegex(ValueError, "names a.f twice"):
      reward_functions.parse(["a.py:f", "a.py:f*2"])


class FunctionsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.file = self.folder / "my_rewards.py"
    self.file.write_text(SOURCE)

  def _functions(self, *names, **options):
    specs = [f"{self.file}:{name}" for name in names]
    return reward_functions.Functions(specs, **options)

  def test_weighted_sum_columns_and_parts(self):
    functions = self._functions("length*0.5", "right", batch_size=2)
    prompts = [
      asked.Prompt("same", columns={"answer": "abc"}),
      asked.Prompt("same", columns={"answer": "d"}),
      asked.Prompt("other", columns={"answer": None}),
    ]
    scores, parts = functions.score_batch(prompts, ["abc", "ef", ""])
    np.testing.assert_allclose(scores, [0.5 * 3 + 1, 1, 0])
    self.assertEqual(
      parts[0],
      {
        "rewards/length": 3.0,
        "rewards/length/weighted": 1.5,
        "rewards/right": 1.0,
        "rewards/right/weighted": 1.0,
        "is_correct": True,
      },
    )
    # Where nobody says it, a response is not right.
    self.assertEqual([p["is_correct"] for p in parts], [True, False, False])
    self.assertIsNone(parts[2]["rewards/right"])

  def test_none_of_all_functions_is_no_score(self):
    prompts = [asked.Prompt("p", columns={"answer": a}) for a in ("a", None)]
    scores, _ = self._functions("right").score_batch(prompts, ["a", "a"])
    np.testing.assert_array_equal(scores, [1, np.nan])

  def test_functions_of_trl(self):
    messages = [{"role": "user", "content": "2+2"}]
    prompts = [
      asked.Prompt("<user>2+2", messages, {"solution": text})
      for text in ("4", "5")
    ]
    functions = self._functions("trl", "plain_trl", "later", "numbers")
    scores, parts = functions.score_batch(prompts, ["4", "4"])
    self.assertEqual([p["rewards/trl"] for p in parts], [1.0, None])
    # A list of one message; then `later`, then 0 and 1.
    np.testing.assert_allclose(scores, [1 + 1 + 1 + 0, 1 + 1 + 1])
    _, parts = self._functions("plain_trl").score_batch(["p"], ["four"])
    self.assertEqual(parts[0]["rewards/plain_trl"], 4.0)

  @parameterized.parameters(
    ("raises", ["a", ""], "raised ZeroDivisionError.*line .*my_rewards.py"),
    ("sleeps", ["a", "slow"], "took more than the 2 seconds"),
    ("dies", ["a", "kill"], "ended its process"),
    ("few", ["a", "b"], "returned 1 rewards for 2 responses"),
    ("a_text", ["a"], "returned a str rather than a list of 1"),
    ("nan", ["a"], "returned nan, which is neither a finite number"),
    ("odd_pair", ["a"], "a pair that is not a number and a dict"),
    ("huge", ["a"], "returned a int that cannot be shown"),
    ("without_end", ["a"], "returned 2 rewards for 1 responses"),
  )
  def test_a_failure_names_function_prompt_and_response(
    self, name, responses, message
  ):
    functions = self._functions(name, timeout=2.0)
    prompts = [f"prompt {i}" for i in range(len(responses))]
    with self.assertRaisesRegex(ValueError, message) as caught:
      functions.score_batch(prompts, responses)
    self.assertIn(f"my_rewards.py:{name}", str(caught.exception))
    # A function that counts its rewards wrongly is to blame for all of them.
    row = 0 if name == "few" else len(responses) - 1
    self.assertIn(repr(prompts[row]), str(caught.exception))
    self.assertIn(repr(responses[row]), str(caught.exception))

  def test_numbers_in_many_forms(self):
    names = ("column", "row", "lists", "decimals", "tensor")
    _, parts = self._functions(*names).score_batch(["p"] * 3, ["a", "b", "c"])
    for name in names:
      found = [part[f"rewards/{name}"] for part in parts]
      self.assertEqual(found, [0.0, 1.0, 2.0], name)

  def test_the_answer_of_a_fork_is_not_that_of_the_worker(self):
    functions = self._functions("forks", batch_size=1)
    scores, _ = functions.score_batch(["p"] * 2, ["a", "b"])
    np.testing.assert_array_equal(scores, [0.0, 0.0])

  def test_skip_unscored_leaves_out_the_culprit_alone(self):
    functions = self._functions("raises", skip_unscored=True)
    with self.assertLogs("absl", "WARNING") as logs:
      scores, _ = functions.score_batch(["p"] * 3, ["ab", "", "abcd"])
    np.testing.assert_array_equal(scores, [0.5, np.nan, 0.25])
    self.assertIn("left out 1 of 3 responses", logs.output[0])

  def test_what_no_response_can_help_is_never_skipped(self):
    for functions, message in (
      (self._functions("needs", skip_unscored=True), "needs .* 'gold'.*answer"),
      (
        self._functions("of_a_trainer"),
        "TRL's trainer alone has completion_id",
      ),
      (self._functions("absent", skip_unscored=True), "no function absent; it"),
      (
        reward_functions.Functions(
          [f"{self.folder}/none.py:f"], skip_unscored=True
        ),
        "there is no such file",
      ),
      (
        reward_functions.Functions(["no_such_module:f"], skip_unscored=True),
        "there is no such module",
      ),
    ):
      prompt = asked.Prompt("p", columns={"answer": 1})
      with self.assertRaisesRegex(ValueError, message):
        functions.score_batch([prompt], ["r"])

  def test_right_at(self):
    functions = self._functions("length", right_at=2.0)
    _, parts = functions.score_batch(["p"] * 3, ["a", "ab", "abc"])
    self.assertEqual([p["is_correct"] for p in parts], [False, True, True])

  def test_a_module_of_the_current_folder(self):
    package = self.folder / "my_package"
    package.mkdir()
    (package / "rewards.py").write_text(
      textwrap.dedent("""
        from my_package import helper
        def style(responses):
          return [helper.VALUE for _ in responses]
      """)
    )
    (package / "helper.py").write_text("VALUE = 7")
    before = os.getcwd()
    self.addCleanup(os.chdir, before)
    os.chdir(self.folder)
    score = scorers.of_functions(["my_package.rewards:style*0.5"])
    scores, _ = score(["p"], ["r"])
    np.testing.assert_allclose(scores, [3.5])

  def test_description_changes_with_the_file(self):
    first = self._functions("length").description
    self.file.write_text(SOURCE + "\n# Changed.")
    self.assertNotEqual(first, self._functions("length").description)


if __name__ == "__main__":
  absltest.main()

import pathlib
import tempfile
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import parameterized

from rljax import tasks
from rljax.tasks import diversity
from rljax.text import files, keywords, logged

REPLIES = (
  "good movie",
  "bad movie plot",
  "good good plot twist ending today",
)
# (1 + 3) / (1 + 2) and (1 + 3) / (1 + 1).
TWICE, ONCE = 1.287682, 1.693147
SCORES = (
  # Two of equal weight: 1 / sqrt(2), times 2/10.
  ("good movie", 0.141421),
  # "a" is no word.
  ("a plot", 0.1),
  # Weights 1.29, 1.29, 1.69, 1.69; mean 0.495438, times 4/10.
  ("good plot twist ending", 0.198175),
  # With five words the factor is gone.
  ("good plot twist ending today", 0.443496),
  ("Good PLOT, twist-ending today!", 0.443496),
  ("unseen words", 0.0),
  ("", 0.0),
)


class TfIdfTest(parameterized.TestCase):
  def test_idf(self):
    idf = diversity.TfIdf(REPLIES).idf
    self.assertEqual(
      {word: round(weight, 6) for word, weight in idf.items()},
      {
        **dict.fromkeys(("good", "movie", "plot"), TWICE),
        **dict.fromkeys(("bad", "ending", "today", "twist"), ONCE),
      },
    )

  @parameterized.parameters(*SCORES)
  def test_score(self, reply, expected):
    score = diversity.TfIdf(REPLIES).score(reply)
    self.assertAlmostEqual(score, expected, places=6)

  def test_repeated_words(self):
    # (2, 1) / sqrt(5): mean 3 / (2 sqrt 5), times 2/10.
    score = diversity.TfIdf(REPLIES).score("good movie unseen good")
    self.assertAlmostEqual(score, 0.3 / np.sqrt(5))

  @hypothesis.given(st.lists(st.sampled_from(" ".join(REPLIES).split())))
  def test_properties(self, words):
    fitted = diversity.TfIdf(REPLIES)
    score = fitted.score(" ".join(words))
    # At most each of k words has 1 / sqrt(k), and at k = 5 that is largest.
    self.assertBetween(score, 0, 1 / np.sqrt(5) + 1e-9)
    self.assertAlmostEqual(score, fitted.score(" ".join(words[::-1])))

  def test_no_words(self):
    with self.assertRaisesRegex(ValueError, "The 2 replies have no words"):
      diversity.TfIdf(["a", "-"])


class TaskTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    temporary = tempfile.TemporaryDirectory()
    self.addCleanup(temporary.cleanup)
    self.file = str(pathlib.Path(temporary.name) / "logged.jsonl")
    # Second candidates do not count.
    files.write_jsonl(
      self.file,
      [
        {"prompt": f"{i % 2}", "chosen": reply, "rejected": "good good"}
        for i, reply in enumerate(REPLIES)
      ],
    )

  def test_by_name(self):
    task = tasks.load("diversity")
    keywords.check(task.prompts, {"data": self.file})
    replies = [reply for reply, _ in SCORES]
    with mock.patch.object(logged, "load", wraps=logged.load) as load:
      scores, parts = tasks.score_all(
        task, ["?"] * len(replies), replies, fit_on=self.file
      )
    load.assert_called_once()
    np.testing.assert_allclose(scores, [s for _, s in SCORES], atol=1e-6)
    self.assertEqual([p["num_words"] for p in parts], [2, 1, 4, 5, 5, 0, 0])
    self.assertAlmostEqual(parts[0]["mean_entry"], 0.707107, places=6)
    self.assertEqual(parts[-1]["mean_entry"], 0.0)

  def test_prompts(self):
    texts = diversity.prompts("train", 3, num=5, data=self.file)
    self.assertEqual({*texts[:2]}, {"0", "1"})
    self.assertEqual({*texts[2:4]}, {"0", "1"})
    self.assertLen(texts, 5)
    first = diversity.prompts("train", 3, num=3, data=self.file)
    self.assertEqual(first, texts[:3])
    orders = {
      tuple(diversity.prompts("train", seed, num=2, data=self.file))
      for seed in range(9)
    }
    self.assertLen(orders, 2)
    self.assertEqual(diversity.prompts("train", 3, num=0, data=self.file), [])

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, "need the option data"):
      diversity.prompts("train", 0)
    with self.assertRaisesRegex(ValueError, "need the option fit_on"):
      diversity.score("", "")
    messages = [{"role": "user", "content": "a"}]
    files.write_jsonl(self.file, [{"prompt": messages, "response": "b"}])
    with self.assertRaisesRegex(ValueError, ":1: the prompt is a list of mess"):
      diversity.prompts("train", 0, data=self.file)

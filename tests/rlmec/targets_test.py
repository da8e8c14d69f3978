"""Tests of what is learnt in RLMEC, on two rows made by hand."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from rljax.rlmec import prompts, targets
from rljax.tasks import chains
from rljax.text import files, tokens

RIGHT = {
  "is_right": True,
  "prompt_ids": [7, 8],
  "response_ids": [1, 2, 3],
  "probs": [0.9, 0.5, 0.2],
  "ref_log_probs": [-1.0, -2.0, -3.0],
  "dropped": [False, False, False],
  "rewrite_ids": [1, 2, 3],
  "rewrite_edited": [False, False, False],
  # The gold solution has another style: a right sample is not to lose its own.
  "gold_ids": [4, 4, 4, 4],
  "gold_edited": [True, True, True, True],
}
WRONG = {
  "is_right": False,
  "prompt_ids": [9],
  "response_ids": [5, 6, 3, 3],
  "probs": [0.99, 0.45, 0.01, 0.6],
  "ref_log_probs": [-0.5, -1.5, -2.5, -3.5],
  "dropped": [False, True, True, False],
  "rewrite_ids": [5, 2, 3],
  "rewrite_edited": [False, True, False],
  "gold_ids": [1, 2],
  "gold_edited": [True, False],
}


def _arrays(rows=(RIGHT, WRONG), **options):
  return targets.arrays(rows, prompt_length=3, response_length=5, **options)


class ArraysTest(parameterized.TestCase):
  @parameterized.parameters(
    ("model", [[0.4, 0, 0, 0, 0], [0, -0.05, -0.1, 0, 0]]),
    ("alignment", [[0.5, 0.5, 0.5, 0, 0], [0, -0.1, -0.1, 0, 0]]),
    ("sequence", [[0.5, 0.5, 0.5, 0, 0], [-0.1, -0.1, -0.1, -0.1, 0]]),
    ("none", [[0] * 5, [0] * 5]),
  )
  def test_rewards(self, name, expected):
    found = _arrays(token_rewards=name)
    self.assertEqual(found["rewards"].dtype, np.float32)
    np.testing.assert_allclose(found["rewards"], expected, atol=1e-6)

  @parameterized.parameters("model", "alignment", "sequence")
  def test_bounds(self, name):
    found = _arrays(
      token_rewards=name, threshold=0.3, max_reward=0.25, max_penalty=0.2
    )["rewards"]
    self.assertAlmostEqual(found.max(), 0.25, places=6)
    self.assertAlmostEqual(found.min(), -0.2, places=6)

  def test_threshold_moves_the_models_rewards(self):
    found = _arrays(threshold=0.1, max_reward=1.0)["rewards"]
    np.testing.assert_allclose(found[0], [0.8, 0.4, 0.1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found[1], [0, 0, -0.09, 0, 0], atol=1e-6)

  def test_rewrites_are_imitated(self):
    found = _arrays()
    np.testing.assert_array_equal(
      found["imitated_ids"], [[1, 2, 3, 0, 0], [5, 2, 3, 0, 0]]
    )
    np.testing.assert_allclose(
      found["weights"], [[0.5, 0.5, 0.5, 0, 0], [0.5, 1, 0.5, 0, 0]]
    )

  def test_gold_is_imitated_where_the_sample_is_wrong(self):
    found = _arrays(imitate="gold")
    np.testing.assert_array_equal(
      found["imitated_ids"], [[1, 2, 3, 0, 0], [1, 2, 0, 0, 0]]
    )
    np.testing.assert_allclose(
      found["weights"], [[0.5, 0.5, 0.5, 0, 0], [1, 0.5, 0, 0, 0]]
    )
    np.testing.assert_array_equal(found["imitated_mask"].sum(axis=1), [3, 2])

  def test_weights(self):
    found = _arrays(edited_weight=3.0, kept_weight=0.0)["weights"]
    np.testing.assert_allclose(found, [[0] * 5, [0, 3, 0, 0, 0]])

  def test_samples_and_their_first_log_probs(self):
    found = _arrays()
    np.testing.assert_array_equal(
      found["response_ids"], [[1, 2, 3, 0, 0], [5, 6, 3, 3, 0]]
    )
    np.testing.assert_array_equal(found["response_mask"].sum(axis=1), [3, 4])
    # Prompts are padded on the left.
    np.testing.assert_array_equal(
      found["prompt_mask"], [[False, True, True], [False, False, True]]
    )
    np.testing.assert_allclose(
      found["ref_log_probs"],
      [[-1, -2, -3, 0, 0], [-0.5, -1.5, -2.5, -3.5, 0]],
    )

  def test_rows_do_not_depend_on_each_other(self):
    both = _arrays()
    for i, row in enumerate((RIGHT, WRONG)):
      for name, array in _arrays([row]).items():
        np.testing.assert_array_equal(array[0], both[name][i], err_msg=name)

  @parameterized.parameters(
    ({"token_rewards": "oracle"}, "token_rewards must be one of model, "),
    ({"imitate": "sample"}, "imitate must be one of rewrite, gold"),
  )
  def test_unknown_names(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      _arrays(**options)


LIMITS = targets.Limits(32, 99)
TOKENIZER = chains.character_tokenizer()
QUESTION = "Q12+5*3"
RECORD = {
  "prompt": QUESTION,
  "gold": "12+5=17;17*3=51;A51",
  "response": "12+5=18;A18",
  "rewrite": "12+5=17;A17",
  "is_right": False,
}


class RowsTest(parameterized.TestCase):
  """Rows of supervision on their way from texts."""

  def encode(self, *rows, limits=LIMITS, max_positions=128):
    return targets.encode(
      rows,
      [row["prompt"] for row in rows],
      TOKENIZER,
      prompts.TEMPLATES["compact"],
      limits=limits,
      max_positions=max_positions,
    )

  def test_texts_become_tokens_with_their_end(self):
    (row,), (question,), skipped = self.encode(RECORD)
    self.assertEmpty(skipped)
    (prompt_ids,) = tokens.encode_prompts(TOKENIZER, [QUESTION], max_length=99)
    self.assertEqual(row["prompt_ids"], prompt_ids)
    for name in ("response", "rewrite", "gold"):
      ids = row[f"{name}_ids"]
      self.assertLen(ids, len(RECORD[name]) + 1)
      self.assertEqual(ids[-1], TOKENIZER.eos_token_id)
    text = f"{QUESTION}G{RECORD['gold']}P{RECORD['response']}R"
    (asked,) = tokens.encode_prompts(TOKENIZER, [text], max_length=99)
    self.assertEqual(question, asked)

  @parameterized.parameters(
    # 41 tokens of the question, 12 of either text. Each limit by itself.
    ({"limits": targets.Limits(11, 99)}, "11 for the others"),
    ({"limits": targets.Limits(32, 52)}, "are 52 for the first two together"),
    ({"max_positions": 64}, "32 for the question"),
  )
  def test_what_is_too_long_is_named(self, options, message):
    found, questions, (skipped,) = self.encode(RECORD, **options)
    self.assertEmpty(found)
    self.assertEmpty(questions)
    self.assertIn(message, skipped)
    self.assertIn("question has 41 tokens, the sample 12", skipped)
    kept, _, _ = self.encode(RECORD, limits=targets.Limits(12, 53))
    self.assertLen(kept, 1)

  def test_edits_to_either_right_text(self):
    rows, _, _ = self.encode(RECORD)
    (row,) = targets.edited(rows, mode="clean")
    self.assertEqual(row["rewrite_distance"], 2)
    # 18 becomes 17, twice; the end token stays.
    self.assertEqual(np.flatnonzero(row["rewrite_edited"]).tolist(), [6, 10])
    self.assertEqual(row["dropped"], row["rewrite_dropped"])
    self.assertLen(row["gold_edited"], len(row["gold_ids"]))
    self.assertNotIn("dropped", rows[0])

  def test_facts_are_about_the_wrong_ones(self):
    rows = [
      {"is_right": False, "rewrite_distance": 1, "gold_distance": 4},
      {"is_right": False, "rewrite_distance": 2, "gold_distance": 4},
      {"is_right": True, "rewrite_distance": 0, "gold_distance": 9},
    ]
    self.assertEqual(
      targets.facts(rows),
      {
        "wrong": 2,
        "right": 1,
        "edits of a rewrite": 1.5,
        "edits to the gold solution": 4.0,
      },
    )

  def test_other_methods_learn_from_the_same_samples(self):
    right = RECORD | {"response": "12+5=17;A17", "is_right": True}
    lost = RECORD | {"prompt": "Q1+1", "gold": "1+1=2;A2"}
    found = targets.for_other_methods([RECORD, right, lost], [RECORD, right])
    self.assertEqual(
      found["right"], [{"prompt": QUESTION, "response": "12+5=17;A17"}]
    )
    self.assertEqual(
      found["gold"],
      [
        {"prompt": QUESTION, "response": RECORD["gold"]},
        {"prompt": "Q1+1", "response": "1+1=2;A2"},
      ],
    )
    self.assertEqual(
      found["pairs"],
      [
        {
          "prompt": QUESTION,
          "chosen": "12+5=17;A17",
          "rejected": "12+5=18;A18",
        }
      ],
    )

  def test_shape_holds_either_text(self):
    self.assertEqual(
      targets.shape([RIGHT, WRONG], "rewrite"),
      {"prompt_length": 2, "response_length": 4},
    )
    long = WRONG | {"gold_ids": [1] * 5}
    self.assertEqual(targets.shape([long], "gold")["response_length"], 6)
    self.assertEqual(targets.shape([long], "rewrite")["response_length"], 4)

  def test_blame_is_of_wrong_samples(self):
    (flagged,), (dropped,) = targets.blame([RIGHT, WRONG], 0.5)
    np.testing.assert_array_equal(flagged, [False, True, True, False])
    np.testing.assert_array_equal(dropped, WRONG["dropped"])


class PageTest(absltest.TestCase):
  def rows(self, imitate, limit):
    more = {"prompt": "q", "error_step": 1, "gold_distance": 3}
    more |= {"rewrite_distance": 2}
    for name in ("rewrite", "gold"):
      more[f"{name}_dropped"] = [True, False, False, False]
    wrong, right = WRONG | more, RIGHT | more
    values = np.arange(25.0).reshape(5, 5)
    return targets.shown(
      [right, wrong, wrong, right, wrong],
      values,
      imitate=imitate,
      limit=limit,
    )

  def test_a_quarter_is_right_and_the_rest_wrong(self):
    found = self.rows("rewrite", 4)
    self.assertEqual(
      [row["facts"]["right"] for row in found], [False] * 3 + [True]
    )
    self.assertEqual(len(self.rows("rewrite", 8)), 5)
    # Values are those of the sample's own row, and of its tokens alone.
    np.testing.assert_array_equal(found[0]["values"], [5, 6, 7, 8])
    np.testing.assert_array_equal(found[3]["values"], [0, 1, 2])

  def test_what_is_imitated_stands_beside_it(self):
    first = self.rows("rewrite", 4)[0]
    self.assertEqual(first["rewrite_ids"], WRONG["rewrite_ids"])
    self.assertEqual(first["rewrite_marked"], WRONG["rewrite_edited"])
    self.assertEqual(
      first["facts"],
      {
        "right": False,
        "first wrong step": 1,
        "edits": 2,
        "edits to the gold solution": 3,
      },
    )
    gold = self.rows("gold", 4)
    self.assertEqual(gold[0]["rewrite_ids"], WRONG["gold_ids"])
    self.assertEqual(gold[0]["facts"]["edits"], 3)
    self.assertNotIn("rewrite_ids", gold[3])


class RecordsTest(absltest.TestCase):
  def test_records_that_fit(self):
    with tempfile.TemporaryDirectory() as folder:
      record = {"prompt": QUESTION, "response": "A51"}
      long = {"prompt": QUESTION * 3, "response": "A51"}
      files.write_jsonl(pathlib.Path(folder, "records.jsonl"), [record, long])
      pathlib.Path(folder, "held_out.jsonl").touch()
      read = lambda **limits: targets.encode_records(
        folder,
        TOKENIZER,
        **{"max_question_length": 99, "max_positions": 99} | limits,
      )
      train, held_out, skipped = read()
      self.assertLen(train, 2)
      self.assertEmpty(held_out + skipped)
      prompt_ids, ids = train[0]
      self.assertLen(prompt_ids, 8)
      self.assertLen(ids, 4)
      for limits in ({"max_question_length": 20}, {"max_positions": 16}):
        train, _, (message,) = read(**limits)
        self.assertLen(train, 1)
        self.assertIn("records: a question has 22 tokens, the lim", message)


class FirstRatioTest(parameterized.TestCase):
  @parameterized.parameters((1.01, True), (0.9, False), (np.nan, False))
  def test_another_policy_is_found_out(self, ratio, is_exact):
    metrics = {"token/ratio_mean": ratio, "token/count": 3.0}
    with self.assertRaisesRegex(ValueError, "not those of --policy"):
      targets.check_first_ratio(metrics, is_exact=is_exact)

  @parameterized.parameters((1.0005, 3.0, True), (1.01, 3.0, False), (0, 0, 1))
  def test_rounding_and_batches_without_rewards_pass(self, ratio, count, kind):
    metrics = {"token/ratio_mean": ratio, "token/count": count}
    targets.check_first_ratio(metrics, is_exact=bool(kind))
    targets.check_first_ratio({}, is_exact=True)


if __name__ == "__main__":
  absltest.main()

"""Tests of how likely a model finds given texts."""

import functools

import numpy as np
import pytest
from absl.testing import parameterized

from rljax.distributed import meshes
from rljax.models import hf
from rljax.scoring import cached, likelihood
from rljax.tasks import word_lists
from rljax.text import encoding, logged
from tests import tiny

pytest.importorskip("tokenizers")

MODEL = tiny.model(tiny.llama_config(vocab_size=120, num_layers=1))
# Prompts of 7 tokens and of 2, replies of 3 and 5 with their end.
PROMPTS = ("birds 4 not duck owl:", "fish", "fish 2 not cod eel:")
TEXTS = ([" fig axe", " dove hawk wren lark"], [], [" tuna sole"])
LIMITS = {
  "prompt_format": "plain",
  "max_prompt_length": 8,
  "max_response_length": 8,
  "too_long": "error",
}


@functools.cache
def _loaded(**fields):
  config = MODEL.config
  tokenizer = word_lists.word_tokenizer()
  return hf.LanguageModel(MODEL, tiny.params(config), tokenizer, "here", None)


def _of_texts(texts=TEXTS, batch_size=4, mesh="data:1", **limits):
  return likelihood.of_texts(
    _loaded(),
    logged.from_prompts(PROMPTS, "here"),
    texts,
    batch_size=batch_size,
    mesh=meshes.make(mesh),
    **LIMITS | limits,
  )


class LikelihoodTest(parameterized.TestCase):
  @parameterized.parameters((4, "data:1"), (2, "data:2"))
  def test_texts_stand_behind_their_prompts(self, batch_size, mesh):
    found = _of_texts(batch_size=batch_size, mesh=mesh)
    lengths = [[len(values) for values in row] for row in found]
    self.assertEqual(lengths, [[3, 5], [], [3]])
    # They are what the padded arrays say, and each is as if it were alone.
    encoded = encoding.prepare(
      _loaded().tokenizer,
      logged.from_rows(
        [{"prompt": PROMPTS[0], "candidates": TEXTS[0], "rewards": [0, 1]}],
        "here",
      ),
      **LIMITS,
    )
    whole = cached.response_log_probs(
      MODEL, _loaded().params, encoded, batch_size=2, mesh=meshes.make("data:1")
    )
    for values, expected in zip(found[0], whole[0], strict=True):
      np.testing.assert_allclose(values, expected[: len(values)], atol=1e-5)
      self.assertEqual(values.dtype, np.float32)
    (alone,) = _of_texts([[], [], TEXTS[2]])[2]
    np.testing.assert_allclose(found[2][0], alone, atol=1e-5)

  def test_logged_replies(self):
    rows = logged.from_rows(
      [{"prompt": PROMPTS[i], "response": TEXTS[i][0]} for i in (0, 2)], "here"
    )
    encoded = encoding.prepare(_loaded().tokenizer, rows, **LIMITS)
    found = likelihood.of_replies(
      _loaded(), encoded, batch_size=2, mesh=meshes.make("data:1")
    )
    expected = _of_texts()
    for (values,), others in zip(
      found, (expected[0], expected[2]), strict=True
    ):
      np.testing.assert_allclose(values, others[0], atol=1e-5)

  def test_rows_of_no_use(self):
    self.assertEqual(_of_texts([[], [], []]), [[], [], []])
    # Five tokens are too many: the row is left out, or refused.
    found = _of_texts(max_response_length=4, too_long="skip")
    self.assertEqual([len(row) for row in found], [0, 0, 1])
    with self.assertRaisesRegex(ValueError, "the longest reply 5"):
      _of_texts(max_response_length=4)

  def test_longer_than_the_context(self):
    texts = [[" dove" * 62], [], []]
    with self.assertRaisesRegex(ValueError, "64 positions"):
      _of_texts(texts, max_response_length=99)

"""Tests of responses that are drawn once and kept."""

import contextlib
import functools
import io
import json
import pathlib
import tempfile
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from rljax.distributed import meshes
from rljax.generation import responses, samplers
from rljax.models import hf
from rljax.scoring import drawn, scorers
from rljax.tasks import word_lists
from rljax.text import encoding, files, logged, prompts
from tests import tiny

pytest.importorskip("tokenizers")

MODEL = tiny.model(tiny.llama_config(vocab_size=120, num_layers=1))
PROMPTS = ("birds 4 not duck owl:", "fish 2 not cod eel:")
LIMITS = {
  "prompt_format": "plain",
  "max_prompt_length": 8,
  "max_response_length": 8,
}


@functools.cache
def _loaded(seed=0):
  params = tiny.params(MODEL.config, seed)
  tokenizer = word_lists.word_tokenizer()
  return hf.LanguageModel(MODEL, params, tokenizer, "here", None)


class CollectTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(folder, "samples", "x.jsonl")

  def collect(self, seed=0, texts=PROMPTS, described=(), **settings):
    """Collects, and counts the responses that were scored."""
    policy = _loaded(seed)
    rows = logged.from_prompts(texts, "here")
    encoded = encoding.prepare(policy.tokenizer, rows, **LIMITS)
    settings = responses.Settings(max_length=4, num_samples=3, **settings)
    sampler = samplers.Sampler(
      policy.model, policy.tokenizer, settings, mesh=meshes.make("data:1")
    )
    asked = prompts.of_rows(rows, encoded, templated=False)
    responder = sampler.responder(asked, batch_size=2)
    score = scorers.of_task(word_lists)
    description = score.description | dict(described)
    counted = mock.Mock(side_effect=score, description=description)
    drawn.collect(
      self.path, responder, policy, encoded, rows, counted, settings=settings
    )
    return sum(len(call.args[0]) for call in counted.call_args_list)

  def test_what_is_there_is_not_drawn_again(self):
    self.assertEqual(self.collect(), 6)
    rows = files.read_jsonl(self.path)
    self.assertEqual(
      [row["prompt"] for row in rows], np.repeat(PROMPTS, 3).tolist()
    )
    made_of = json.loads(self.path.with_suffix(".json").read_text())
    self.assertEqual((made_of["num_samples"], made_of["has_tags"]), (3, False))
    self.assertEqual(self.collect(), 0)
    # A file that was stopped goes on, with the same outcome.
    content = self.path.read_bytes()
    self.path.write_bytes(content[:-20])
    self.assertEqual(self.collect(), 3)
    self.assertEqual(self.path.read_bytes(), content)

  @parameterized.parameters(
    {"seed": 1},
    {"texts": PROMPTS[::-1]},
    {"described": (("parse", "other"),)},
    {"temperature": 0.5},
  )
  def test_samples_of_something_else_are_drawn_again(self, **change):
    self.collect()
    with contextlib.redirect_stdout(io.StringIO()) as said:
      self.assertEqual(self.collect(**change), 6)
    self.assertIn("x.jsonl is of another policy", said.getvalue())
    self.assertEqual(self.collect(**change), 0)

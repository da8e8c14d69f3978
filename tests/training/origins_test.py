"""Tests of what is checked of the models that a run starts from."""

import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest

from rljax.training import origins


class OriginsTest(absltest.TestCase):
  def test_weights_are_those_of_the_first_start(self):
    workdir = self.enter_context(tempfile.TemporaryDirectory())
    weights = {"a": np.float32([1, 2])}
    origins.check_models(workdir, {"policy": weights, "base": weights})
    origins.check_models(workdir, {"policy": weights, "base": weights})
    other = {"a": np.float32([1, 3])}
    with self.assertRaisesRegex(ValueError, "--base holds other weights than"):
      origins.check_models(workdir, {"policy": weights, "base": other})

  def test_other_things_to_start_from_are_those_of_the_first_start(self):
    workdir = self.enter_context(tempfile.TemporaryDirectory())
    weights = {"policy": {"a": np.float32([1, 2])}}
    origins.check_models(workdir, weights, {"The rows of data": "abc"})
    origins.check_models(workdir, weights, {"The rows of data": "abc"})
    with self.assertRaisesRegex(ValueError, "The rows of data are others than"):
      origins.check_models(workdir, weights, {"The rows of data": "abd"})

  def test_same_kind(self):
    policy = mock.Mock(**{"model.config": 1, "tokenizer.eos_token_id": 2})
    policy.tokenizer.get_vocab.return_value = {"a": 0}

    def other(config=1, end=2, vocabulary=("a",)):
      found = mock.Mock(
        **{"model.config": config, "tokenizer.eos_token_id": end}
      )
      found.tokenizer.get_vocab.return_value = {v: 0 for v in vocabulary}
      return found

    origins.check_same_kind("--base=x", other(), policy)
    with self.assertRaisesRegex(ValueError, "--base=x is another architecture"):
      origins.check_same_kind("--base=x", other(config=3), policy)
    for different in (other(end=3), other(vocabulary=("b",))):
      for check in (origins.check_same_kind, origins.check_same_tokens):
        with self.assertRaisesRegex(ValueError, "vocabulary or end token"):
          check("--base=x", different, policy)
    # Of a model that shares the tokens alone.
    origins.check_same_tokens("--base=x", other(config=3), policy)


if __name__ == "__main__":
  absltest.main()

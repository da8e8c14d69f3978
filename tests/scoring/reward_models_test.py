"""Tests of classifiers as rewards."""

import dataclasses
import functools
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from absl.testing import parameterized

from rljax import tasks
from rljax.distributed import meshes
from rljax.evaluation import answers
from rljax.models import classifier, encoder, hf
from rljax.scoring import reward_models
from tests import tiny

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

_LETTERS = "abcdefghijklmnopqrstuvwxyz ."


def _tokenizer(*, is_encoder=False, start=False):
  """One token per letter; [CLS] and [SEP] around, or an end token."""
  import transformers

  names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
  vocab = {name: i for i, name in enumerate([*names, *_LETTERS])}
  model = tokenizers.models.WordLevel(vocab, unk_token="[UNK]")
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  processors = tokenizers.processors
  if is_encoder:
    backend.post_processor = processors.TemplateProcessing(
      single="[CLS] $A [SEP]",
      pair="[CLS] $A [SEP] $B:1 [SEP]:1",
      special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    # Files of encoders may ask for lengths of their own.
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
  elif start:
    backend.post_processor = processors.TemplateProcessing(
      single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
  special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
  if is_encoder:
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
  else:
    special |= {"eos_token": "[SEP]"} | (
      {"bos_token": "[CLS]"} if start else {}
    )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, **special
  )


def _backbone():
  return tiny.llama_config(num_layers=1)


def _ids(text):
  return [_LETTERS.index(letter) + 4 for letter in text]


@functools.lru_cache
def _random_params(model, seed=0):
  """Random everywhere; the scales of norms lie around 1."""
  ids = np.zeros((1, 1), np.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids == 0)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    value = 0.4 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")
    return value.astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes["params"])


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, ids, mask, types):
  more = () if types is None else (types,)
  return model.apply({"params": params}, ids, mask, *more)


class RewardModelTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def _causal(self, labels=("reward",), **options):
    """A folder with a causal classifier, and what it holds."""
    model = classifier.CausalClassifier(
      classifier.CausalClassifierConfig(_backbone(), labels)
    )
    return self._saved(model, _tokenizer(**options))

  def _encoder(self, labels=("bad", "good"), **fields):
    sizes = dict(
      vocab_size=40,
      hidden_size=16,
      num_layers=1,
      num_heads=4,
      intermediate_size=24,
      max_positions=64,
      labels=labels,
    )
    model = encoder.Encoder(encoder.EncoderConfig(**(sizes | fields)))
    return self._saved(model, _tokenizer(is_encoder=True))

  def _saved(self, model, tokenizer):
    params = _random_params(model)
    path = self.folder / type(model).__name__
    hf.save_classifier(path, model, params, tokenizer)

    def logits(ids, types=None):
      """Those of one row, always in one shape."""
      pad = lambda x: jnp.pad(jnp.int32([x]), ((0, 0), (0, 64 - len(x))))
      mask = jnp.arange(64)[None] < len(ids)
      types = None if types is None else pad(types)
      return np.array(_logits(model, params, pad(ids), mask, types))[0]

    return str(path), logits


class ScoreTest(RewardModelTestCase):
  @parameterized.parameters(False, True)
  def test_causal(self, start):
    path, logits = self._causal(start=start)
    scorer = reward_models.RewardModel(path, max_length=32)
    scores, parts = tasks.score_all(scorer, ["ab ", "z"], ["cd.", "a" * 20])
    first = [2] if start else []
    for i, text in enumerate(["ab cd.", "z" + "a" * 20]):
      (logit,) = logits(first + _ids(text) + [3])
      np.testing.assert_allclose(parts[i]["logit"], logit, rtol=1e-5)
      np.testing.assert_allclose(scores[i], 1 / (1 + np.exp(-logit)), rtol=1e-5)
    self.assertEqual(scores.dtype, np.float32)
    self.assertEqual(answers.mean_parts(parts).keys(), {"logit"})

  def test_special_tokens_are_not_doubled(self):
    path, logits = self._causal(start=True)
    scorer = reward_models.RewardModel(path, max_length=32, transform="raw")
    scores, _ = scorer.score_batch(["[CLS]ab"], ["c[SEP]"])
    expected = logits([2, *_ids("abc"), 3])
    np.testing.assert_allclose(scores, expected, rtol=1e-5)

  def test_any_end_token_of_the_model_ends_a_text(self):
    # A chat model ends a turn by another token than its tokenizer a text.
    (turn,) = _ids("c")
    model = classifier.CausalClassifier(
      classifier.CausalClassifierConfig(
        dataclasses.replace(_backbone(), eos_token_id=(turn,)), ("reward",)
      )
    )
    path, logits = self._saved(model, _tokenizer())
    scorer = reward_models.RewardModel(path, max_length=32, transform="raw")
    scores, _ = scorer.score_batch(["ab", "ab"], ["c", "ca"])
    for score, ids in zip(
      scores, ([*_ids("ab"), turn], [*_ids("abca"), 3]), strict=True
    ):
      np.testing.assert_allclose(score, logits(ids)[0], rtol=1e-5)

  def test_template(self):
    path, logits = self._causal()
    scorer = reward_models.RewardModel(
      path, max_length=64, transform="raw", template="q {prompt} a {response}."
    )
    scores, _ = scorer.score_batch(["b"], ["c"])
    expected = logits([*_ids("q b a c."), 3])
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    # What stands in the texts is no field.
    self.assertEqual(
      scorer._text("{response}", "{prompt}{x}"), "q {response} a {prompt}{x}."
    )

  @parameterized.parameters(
    ("raw:good", lambda x: x[1]),
    ("sigmoid:bad", lambda x: 1 / (1 + np.exp(-x[0]))),
    ("softmax:good", lambda x: np.exp(x[1]) / np.exp(x).sum()),
    ("softmax:0", lambda x: np.exp(x[0]) / np.exp(x).sum()),
  )
  def test_labels(self, transform, function):
    path, logits = self._encoder()
    scorer = reward_models.RewardModel(path, max_length=32, transform=transform)
    self.assertEqual(scorer.labels, ("bad", "good"))
    scores, parts = scorer.score_batch(["ab"], ["c"])
    expected = logits([2, *_ids("abc"), 3]).astype(np.float64)
    np.testing.assert_allclose(scores, [function(expected)], rtol=1e-5)
    np.testing.assert_allclose(parts[0]["logit_bad"], expected[0], rtol=1e-5)
    np.testing.assert_allclose(parts[0]["logit_good"], expected[1], rtol=1e-5)

  def test_extreme_logits(self):
    path, _ = self._causal()
    scorer = reward_models.RewardModel(path, max_length=32)
    with np.errstate(all="raise", under="ignore"):
      scores = scorer._scores(np.array([[-1e4], [0], [1e4]], np.float32))
    np.testing.assert_array_equal(scores, [0, 0.5, 1])

  def test_pair(self):
    path, logits = self._encoder()
    scorer = reward_models.RewardModel(
      path, max_length=32, transform="raw:good", template="pair"
    )
    scores, _ = scorer.score_batch(["ab", ""], ["cde", "f"])
    theirs = _tokenizer(is_encoder=True)
    for score, texts in zip(scores, [("ab", "cde"), ("", "f")], strict=True):
      # Their own call, which sets the lengths in the file aside.
      encoded = theirs(*texts, return_token_type_ids=True)
      types = encoded["token_type_ids"]
      self.assertEqual(types[-1], 1)
      expected = logits(encoded["input_ids"], types)
      np.testing.assert_allclose(score, expected[1], rtol=1e-5)

  @parameterized.parameters("roberta", "distilbert")
  def test_encoders_without_token_types(self, model_type):
    types = int(model_type == "roberta")
    path, logits = self._encoder(model_type=model_type, type_vocab_size=types)
    scorer = reward_models.RewardModel(
      path, max_length=32, transform="raw:good", template="pair"
    )
    scores, _ = scorer.score_batch(["ab"], ["c"])
    expected = logits([2, *_ids("ab"), 3, *_ids("c"), 3])
    np.testing.assert_allclose(scores, expected[1:], rtol=1e-5)


class CutTest(RewardModelTestCase):
  """What a text loses, and what is said about it."""

  def _scores(self, scorer, prompts, responses):
    with mock.patch.object(logging, "warning") as warning:
      scores, _ = scorer.score_batch(prompts, responses)
    return scores, [c.args[0] % c.args[1:] for c in warning.call_args_list]

  @parameterized.parameters(False, True)
  def test_causal(self, start):
    path, logits = self._causal(start=start)
    scorer = reward_models.RewardModel(path, max_length=8, transform="raw")
    texts = ["abcdefg.", "abcdef", "abcdefghijklmnop."]
    scores, warnings = self._scores(scorer, texts, ["", "", "z"])
    kept = ["bcdefg.", "abcdef", "lmnop.z"]
    if start:
      kept = ["cdefg.", "abcdef", "mnop.z"]
    first = [2] if start else []
    expected = [logits(first + _ids(text) + [3])[0] for text in kept]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    (warning,) = warnings
    self.assertStartsWith(warning, "2 of 3 texts were cut on the left to 8 tok")

  def test_nothing_is_said_if_all_fit(self):
    path, _ = self._causal()
    scorer = reward_models.RewardModel(path, max_length=8)
    _, warnings = self._scores(scorer, ["abcdefg"], [""])
    self.assertEmpty(warnings)

  def test_encoder(self):
    path, logits = self._encoder()
    scorer = reward_models.RewardModel(path, max_length=6, transform="raw:1")
    scores, warnings = self._scores(scorer, ["abc"], ["def"])
    expected = logits([2, *_ids("cdef"), 3])
    np.testing.assert_allclose(scores, expected[1:], rtol=1e-5)
    self.assertLen(warnings, 1)

  @parameterized.parameters(
    ("abcd", "ef", "cd", "ef"),
    ("abcd", "efgh", "", "efgh"),
    ("abcd", "efghij", "", "ghij"),
    ("", "efghij", "", "ghij"),
  )
  def test_pair(self, prompt, response, kept_prompt, kept_response):
    path, logits = self._encoder()
    scorer = reward_models.RewardModel(
      path, max_length=7, transform="raw:1", template="pair"
    )
    scores, warnings = self._scores(scorer, [prompt], [response])
    ids = [2, *_ids(kept_prompt), 3, *_ids(kept_response), 3]
    num_first = len(kept_prompt) + 2
    types = [0] * num_first + [1] * (len(ids) - num_first)
    expected = logits(ids, types)
    np.testing.assert_allclose(scores, expected[1:], rtol=1e-5)
    self.assertLen(warnings, 1)


class BatchTest(RewardModelTestCase):
  def _texts(self, num_rows=23):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, size=num_rows)
    return ["".join(rng.choice(list(_LETTERS), size=n)) for n in lengths]

  def test_scores_do_not_depend_on_the_other_rows(self):
    path, _ = self._causal()
    texts = self._texts()
    scorer = reward_models.RewardModel(path, max_length=32, batch_size=4)
    empty = [""] * len(texts)
    scores, parts = scorer.score_batch(empty, texts)
    order = np.random.default_rng(1).permutation(len(texts))
    moved, _ = scorer.score_batch(empty, [texts[i] for i in order])
    np.testing.assert_array_equal(moved, scores[order])
    for i in (0, 7, 22):
      alone, _ = scorer.score_batch([""], [texts[i]])
      np.testing.assert_array_equal(alone, scores[i : i + 1])
    self.assertGreater(scores.std(), 0.02)
    self.assertLen(parts, len(texts))

  def test_few_programs_are_compiled(self):
    path, _ = self._causal()
    scorer = reward_models.RewardModel(path, max_length=25, batch_size=5)
    for texts in (self._texts(), self._texts(40), ["a"]):
      scorer.score_batch([""] * len(texts), texts)
    # Lengths 16, 24 and 25, the limit.
    self.assertLen(scorer._program.compilations, 3)

  def test_mesh(self):
    path, _ = self._encoder()
    texts = self._texts(11)
    options = dict(max_length=16, batch_size=8, transform="softmax:good")
    scorer = reward_models.RewardModel(path, **options)
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    split = reward_models.RewardModel(path, mesh=mesh, **options)
    expected, _ = scorer.score_batch([""] * 11, texts)
    scores, _ = split.score_batch([""] * 11, texts)
    self.assertGreater(expected.std(), 0.01)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    self.assertEqual(split.fingerprint, scorer.fingerprint)
    with self.assertRaisesRegex(ValueError, "batch_size must be divisible by"):
      reward_models.RewardModel(
        path, mesh=mesh, **(options | {"batch_size": 6})
      )

  def test_no_rows(self):
    path, _ = self._causal()
    scores, parts = reward_models.RewardModel(path, max_length=32).score_batch(
      [], []
    )
    self.assertEqual((scores.shape, scores.dtype), ((0,), np.float32))
    self.assertEqual(parts, [])


class SettingsTest(RewardModelTestCase):
  def test_fingerprint(self):
    path, _ = self._causal()

    def fingerprint(path=path, **options):
      options = {"max_length": 32, **options}
      return reward_models.RewardModel(path, **options).fingerprint

    first = fingerprint()
    copy = self.folder / "copy"
    loaded = hf.load_classifier(path)
    hf.save_classifier(copy, loaded.model, loaded.params, loaded.tokenizer)
    self.assertEqual(fingerprint(copy, batch_size=3), first)
    others = [
      fingerprint(transform="raw"),
      fingerprint(max_length=31),
      fingerprint(template="{prompt} {response}"),
      fingerprint(dtype="bfloat16"),
    ]
    loaded.params["score"]["kernel"][0, 0] += 1e-3
    hf.save_classifier(copy, loaded.model, loaded.params, loaded.tokenizer)
    others.append(fingerprint(copy))
    loaded.params["score"]["kernel"][0, 0] -= 1e-3
    hf.save_classifier(
      copy, loaded.model, loaded.params, _tokenizer(start=True)
    )
    others.append(fingerprint(copy))
    self.assertLen({first, *others}, 7)

  @parameterized.parameters(
    (dict(transform="tanh"), 'transform must be raw or sigmoid.*got "tanh"'),
    (dict(transform="sigmoid:good"), "names no label.* has the labels reward"),
    (dict(transform="sigmoid:1"), "names no label"),
    (dict(transform="softmax:reward"), "would be 1 for every text"),
    (dict(template="{prompt}"), r"a text with \{response\}"),
    (dict(template="pair"), '"pair" needs an encoder'),
    (dict(max_length=65), "at most the 64 positions of .*got 65"),
    (dict(max_length=1), "above the 1 special tokens"),
    (dict(batch_size=0), "batch_size must be positive"),
  )
  def test_refused(self, options, message):
    path, _ = self._causal()
    with self.assertRaisesRegex(ValueError, message):
      reward_models.RewardModel(path, **{"max_length": 32, **options})

  @parameterized.parameters(
    ("sigmoid", 'of which label: .* bad, good; write "sigmoid:good"'),
    ("softmax", "does not say of which label"),
    ("softmax:better", "names no label: .* has the labels bad, good"),
    ("softmax:2", "names no label"),
  )
  def test_refused_with_labels(self, transform, message):
    path, _ = self._encoder()
    with self.assertRaisesRegex(ValueError, message):
      reward_models.RewardModel(path, max_length=32, transform=transform)

  def test_no_end_token(self):
    model = classifier.CausalClassifier(
      classifier.CausalClassifierConfig(_backbone())
    )
    path, _ = self._saved(model, _tokenizer(is_encoder=True))
    with self.assertRaisesRegex(ValueError, "lacks an end token"):
      reward_models.RewardModel(path, max_length=32)

  def test_unequal_numbers(self):
    path, _ = self._causal()
    scorer = reward_models.RewardModel(path, max_length=32)
    with self.assertRaisesRegex(ValueError, "1 prompts, but 2 responses"):
      scorer.score_batch(["a"], ["b", "c"])

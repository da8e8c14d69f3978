"""Tests of the sentiment task: beginnings of reviews, and VADER's verdict."""

import collections
import importlib.util
import json
import math
import pathlib
import tempfile
import time
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
from absl.testing import absltest, parameterized

from rljax import tasks
from rljax.evaluation import answers
from rljax.tasks import sentiment, tokenizers
from rljax.text import files, tokens
from tests import conftest

SENTENCES = [
  f"the film number {i} is longer than seven words , as it should be ."
  for i in range(300)
]

needs_vader = pytest.mark.skipif(
  importlib.util.find_spec("vaderSentiment") is None,
  reason="needs vaderSentiment: pip install vaderSentiment",
)


def _letters():
  """A tokenizer with one token a character."""
  characters = [chr(i) for i in range(32, 127)]
  return tokenizers.of_words(characters, ".")


class _Folder(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def write(self, **splits):
    """Files of texts by name; returns the folder as an option."""
    for name, texts in splits.items():
      rows = [
        text if isinstance(text, dict) else {"text": text} for text in texts
      ]
      files.write_jsonl(self.folder / f"{name}.jsonl", rows)
    return str(self.folder)


class PromptsTest(_Folder):
  def test_each_begins_a_sentence_of_its_own(self):
    folder = self.write(train=SENTENCES, validation=SENTENCES[:1])
    prompts = sentiment.prompts("train", 0, data=folder, max_length=4)
    self.assertLen(prompts, 300)
    lengths = collections.Counter(len(prompt.split()) for prompt in prompts)
    # 100 of each are expected; the standard deviation is 8.
    self.assertEqual(set(lengths), {2, 3, 4})
    self.assertGreater(min(lengths.values()), 70)
    self.assertSameElements(
      {prompt for prompt in prompts if len(prompt.split()) < 4},
      {"the film", "the film number"},
    )
    numbered = [prompt for prompt in prompts if len(prompt.split()) == 4]
    self.assertLen(set(numbered), len(numbered))

  def test_default_lengths(self):
    folder = self.write(train=SENTENCES, validation=SENTENCES[:1])
    prompts = sentiment.prompts("train", 0, data=folder)
    lengths = collections.Counter(len(prompt.split()) for prompt in prompts)
    self.assertEqual(set(lengths), {2, 3, 4, 5, 6, 7})
    self.assertGreater(min(lengths.values()), 25)  # Of 50 expected.

  def test_draws(self):
    folder = self.write(train=SENTENCES, validation=SENTENCES[:1])
    draw = lambda seed, **options: sentiment.prompts(
      "train", seed, data=folder, **options
    )
    first = draw(1)
    self.assertEqual(first, draw(1))
    self.assertEqual(first[:5], draw(1, num=5))
    self.assertNotEqual(first, draw(2))
    self.assertEqual(draw(1, num=0), [])
    # A second round asks the same texts, with other lengths.
    more = draw(1, num=450, max_length=4)
    once = draw(1, num=300, max_length=4)
    self.assertLen(more, 450)
    self.assertEqual(more[:300], once)
    self.assertNotEqual(more[300:], once[:150])

  def test_supervised_goes_on(self):
    folder = self.write(train=SENTENCES, validation=SENTENCES[:1])
    pairs = sentiment.supervised("train", 3, data=folder)
    self.assertEqual(
      [prompt for prompt, _ in pairs],
      sentiment.prompts("train", 3, data=folder),
    )
    texts = [prompt + rest for prompt, rest in pairs]
    self.assertCountEqual(texts, SENTENCES)
    self.assertNotEqual(texts, SENTENCES)  # Shuffled.
    for _, rest in pairs:
      self.assertStartsWith(rest, " ")

  def test_short_texts_are_left_out_and_counted(self):
    texts = ["one two three", "one two three four five", "a b c d", "x" * 50]
    folder = self.write(train=texts, validation=SENTENCES[:1])
    draw = lambda **options: sentiment.prompts(
      "train", 0, data=folder, **options
    )
    with self.assertLogs("absl", "INFO") as logs:
      # A text must go on after its prompt: "one two three" does not.
      prompts = draw(min_length=3, max_length=3)
    self.assertCountEqual(prompts, ["one two three", "a b c"])
    self.assertIn(
      "2 of 4 texts of the train split were left out", logs.output[0]
    )
    self.assertEqual(
      draw(min_length=3, max_length=3, min_characters=8), ["one two three"]
    )
    with self.assertRaisesRegex(ValueError, "no text of the train .* 9 words"):
      draw(max_length=9)

  def test_markup_and_blanks(self):
    text = (
      "Great <b>fun</b>,<br /><br />\n I\tsaid &amp; 1 < 2 <3 &lt;br&gt; "
      "<a href='x'>so</a> \ud800 it was \x00"
    )
    folder = self.write(validation=[SENTENCES[0]])
    (self.folder / "train.jsonl").write_text(json.dumps({"text": text}))
    ((prompt, rest),) = sentiment.supervised(
      "train", 0, data=folder, min_length=2, max_length=2
    )
    self.assertEqual(prompt, "Great fun")
    self.assertEqual(rest, " , I said & 1 < 2 <3 <br> so ? it was \x00")

  @parameterized.parameters(
    "<" * 10**6, "<a" * 10**6, "<a " + "b" * 10**6, "&" * 10**6, "&#" * 10**5
  )
  def test_hostile_texts_take_no_time(self, text):
    folder = self.write(
      train=["go on and on, " + text], validation=SENTENCES[:1]
    )
    started = time.perf_counter()
    sentiment.prompts("train", 0, data=folder, max_length=2)
    self.assertLess(time.perf_counter() - started, 5)


class TokensTest(_Folder):
  def setUp(self):
    super().setUp()
    pytest.importorskip("tokenizers")
    self.data = self.write(train=SENTENCES, validation=SENTENCES[:1])

  def test_lengths_are_in_tokens(self):
    prompts = sentiment.prompts(
      "train", 0, data=self.data, tokenizer=_letters(), num=120, max_length=9
    )
    # Letters: the first words are "the film".
    self.assertSameElements(
      {len(prompt) for prompt in prompts}, set(range(2, 10))
    )
    for prompt in prompts:
      self.assertStartsWith("the film ", prompt)
    encoded = tokens.encode_prompts(_letters(), prompts, max_length=10)
    for prompt, ids in zip(prompts, encoded, strict=True):
      self.assertLen(ids, 1 + len(prompt))  # With the start token.

  def test_folder_is_as_good(self):
    folder = self.folder / "run" / "model"
    _letters().save_pretrained(folder)
    draw = lambda tokenizer: sentiment.prompts(
      "train", 0, data=self.data, tokenizer=tokenizer, num=20
    )
    expected = draw(_letters())
    self.assertEqual(draw(str(folder)), expected)
    self.assertEqual(draw(str(folder.parent)), expected)
    for name in ("policy", str(self.folder)):
      with self.assertRaisesRegex(ValueError, f"tokenizer.json.*got.*{name}"):
        draw(name)

  def test_half_a_character_is_no_prompt(self):
    pieces = ["t", "h", "e", " ", "first half", "second half"]

    class Halves:
      """Writes an ä in two tokens, neither of which reads as anything."""

      def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [
          i
          for character in text
          for i in ([4, 5] if character == "ä" else [pieces.index(character)])
        ]

      def decode(self, ids, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        text = "".join(pieces[i] for i in ids)
        return text.replace("first halfsecond half", "ä")

    folder = self.write(train=["tähe the"])
    draw = lambda seed, **options: sentiment.supervised(
      "train", seed, data=folder, tokenizer=Halves(), **options
    )
    for seed in range(9):  # Some of them draw two tokens, some three.
      self.assertEqual(
        draw(seed, min_length=2, max_length=3), [("tä", "he the")]
      )
    self.assertEqual(draw(0, min_length=1, max_length=1), [("t", "ähe the")])
    with self.assertRaisesRegex(ValueError, "no text .* has more than 2 tok"):
      draw(0, min_length=1, max_length=2)

  def test_tokens_that_do_not_come_back_are_no_prompt(self):
    class Merges:
      """Writes "th" as one token, but "the" letter by letter."""

      def encode(self, text, add_special_tokens):
        del add_special_tokens
        return ["th"] if text == "th" else list(text)

      def decode(self, ids, clean_up_tokenization_spaces):
        del clean_up_tokenization_spaces
        return "".join(ids)

    folder = self.write(train=["thesis"])
    for seed in range(9):
      self.assertEqual(
        sentiment.prompts(
          "train",
          seed,
          data=folder,
          tokenizer=Merges(),
          min_length=2,
          max_length=3,
        ),
        ["the"],
      )

  def test_what_it_cannot_write_is_named(self):
    folder = self.write(train=["the größte of them"])
    with self.assertRaisesRegex(ValueError, "cannot encode 'the größte"):
      sentiment.prompts("train", 0, data=folder, tokenizer=_letters())


class SplitsTest(_Folder):
  def texts(self, split, data):
    pairs = sentiment.supervised(split, 0, data=str(data))
    return [prompt + rest for prompt, rest in pairs]

  def test_own_files(self):
    parts = {
      "train": SENTENCES[:200],
      "validation": SENTENCES[200:250],
      "test": SENTENCES[250:],
    }
    self.write(**parts)
    for name in (self.folder, self.folder / "{split}.jsonl"):
      for split, texts in parts.items():
        self.assertCountEqual(self.texts(split, name), texts)

  @parameterized.parameters("folder", "template", "tfds")
  def test_validation_is_taken_from_training(self, kind):
    rows = {"train": SENTENCES, "test": ["the test " + "has words " * 9]}
    self.write(**rows)
    names = {
      "folder": self.folder,
      "template": self.folder / "{split}.jsonl",
      "tfds": "tfds:imdb_reviews",
    }
    load = files.load_rows

    def load_rows(name, split, **options):
      if not name.startswith("tfds:"):
        return load(name, split, **options)
      self.assertEqual(
        (name, options), (names["tfds"], {"required": ("text",)})
      )
      return [{"text": text} for text in rows[split]]

    sentiment._texts_of_split.cache_clear()
    self.addCleanup(sentiment._texts_of_split.cache_clear)
    with mock.patch.object(files, "load_rows", load_rows):
      found = {s: self.texts(s, names[kind]) for s in sentiment.SPLITS}
    self.assertCountEqual(found["train"] + found["validation"], SENTENCES)
    self.assertBetween(len(found["validation"]), 15, 45)  # Of 30 expected.
    self.assertEqual(found["test"], [rows["test"][0].strip()])

  def test_one_file(self):
    self.write(all=SENTENCES + SENTENCES[:50])  # Repetitions do not count.
    found = [
      self.texts(split, self.folder / "all.jsonl") for split in sentiment.SPLITS
    ]
    self.assertCountEqual(sum(found, []), SENTENCES)
    for texts, low, high in zip(
      found, (210, 15, 15), (270, 45, 45), strict=True
    ):
      self.assertBetween(len(texts), low, high)  # Of 240, 30 and 30.

  def test_what_is_wrong(self):
    folder = self.write(train=SENTENCES)
    for options, message in (
      ({"data": ""}, "has no data: give data=FOLDER .*tfds:imdb_reviews"),
      ({"data": "nowhere"}, "nowhere: no such file or folder; give data="),
      ({"min_length": 0}, "min_length must be positive .* got 0 and 7"),
      ({"min_length": 8}, "at most max_length, got 8 and 7"),
      ({"num": -1}, "must be >= 0, got 0 and -1"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        sentiment.prompts("train", 0, **({"data": folder} | options))
    with self.assertRaisesRegex(
      ValueError, "train, validation, test, got 'dev'"
    ):
      sentiment.prompts("dev", 0, data=folder)
    with self.assertRaisesRegex(ValueError, "no file for split 'test'"):
      sentiment.prompts("test", 0, data=folder)
    self.write(bad=[{"review": "x"}], number=[{"text": 3}])
    with self.assertRaisesRegex(ValueError, 'bad.jsonl:1: "text" is missing'):
      sentiment.prompts("train", 0, data=f"{folder}/bad.jsonl")
    with self.assertRaisesRegex(ValueError, "row 1 of train.*a text, got 3"):
      sentiment.prompts("train", 0, data=f"{folder}/number.jsonl")


class RealSentencesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.data = str(conftest.shared("data/sentiment"))

  @parameterized.parameters(
    ("train", 8530, 7982), ("validation", 1066, 979), ("test", 1066, 994)
  )
  def test_all_but_the_short_ones(self, split, num_texts, num_prompts):
    texts = [r["text"] for r in files.load_rows(self.data, split)]
    self.assertLen(texts, num_texts)
    prompts = sentiment.prompts(split, 0, data=self.data)
    self.assertLen(prompts, num_prompts)
    lengths = collections.Counter(len(prompt.split()) for prompt in prompts)
    self.assertEqual(set(lengths), {2, 3, 4, 5, 6, 7})
    # Uniform, within five standard deviations.
    share, deviation = num_prompts / 6, math.sqrt(num_prompts * 5 / 36)
    for count in lengths.values():
      self.assertLess(abs(count - share), 5 * deviation)

  def test_real_tokens(self):
    transformers = pytest.importorskip("transformers")
    folder = conftest.shared("data/models/stories260k")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = sentiment.prompts(
      "test", 0, data=self.data, tokenizer=str(folder), num=300
    )
    lengths = [
      len(tokenizer.encode(prompt, add_special_tokens=False))
      for prompt in prompts
    ]
    self.assertEqual(set(lengths), {2, 3, 4, 5, 6, 7})

  @needs_vader
  def test_vader_is_as_good_as_known(self):
    """Accuracy of "compound > 0" on the test split, in its documentation."""
    rows = files.load_rows(self.data, "test")
    right = [
      (sentiment.score("", row["text"])[0] > 0) == row["label"] for row in rows
    ]
    self.assertAlmostEqual(sum(right) / len(right), 0.653, delta=0.001)


@needs_vader
class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(
    # The list says good 1.9, great 3.1, bad -2.5.
    ("the movie was", " good", 1.9),
    ("good", " and great", 5.0),
    ("a great", " day", 3.1),
    ("a bad", " movie", -2.5),
    ("a bad", " and good movie", -0.6),
    ("the film", " of the year", 0.0),
    ("", "", 0.0),
    (" \n", "\t ", 0.0),
    # An exclamation mark is worth 0.292, a negation -0.74 times the word.
    ("it was", " good!!", 1.9 + 2 * 0.292),
    ("it was", " not good", -0.74 * 1.9),
  )
  def test_hand_computed(self, prompt, response, s):
    compound, parts = sentiment.score(prompt, response)
    self.assertAlmostEqual(compound, s / math.sqrt(s**2 + 15), delta=6e-5)
    self.assertEqual(parts["compound"], compound)
    self.assertFalse(parts["is_cut"])

  def test_valence_of_root_fifteen(self):
    lexicon = sentiment._analyzer().lexicon
    with mock.patch.dict(lexicon, {"qwertyish": math.sqrt(15)}):
      self.assertEqual(sentiment.score("a", " qwertyish")[0], 0.7071)
    sentiment._verdict.cache_clear()
    self.assertEqual(sentiment.score("a", " qwertyish")[0], 0.0)

  def test_what_is_read(self):
    both, parts = sentiment.score("a great", " day")
    self.assertGreater(both, 0.6)
    alone, _ = sentiment.score("a great", " day", reads="response")
    self.assertEqual(alone, 0.0)
    # One text, not two: the word is taken apart between them.
    self.assertEqual(sentiment.score("a gr", "eat day"), (both, parts))
    with self.assertRaisesRegex(ValueError, "reads must be .* got 'prompt'"):
      sentiment.score("a", "b", reads="prompt")

  def test_shares(self):
    # Words of a sentiment count one more than their valence: 2.9 of 5.9.
    _, parts = sentiment.score("the film was", " good")
    self.assertAlmostEqual(parts["positive"], 2.9 / 5.9, delta=6e-4)
    self.assertAlmostEqual(parts["neutral"], 3 / 5.9, delta=6e-4)
    self.assertEqual(parts["negative"], 0.0)
    _, parts = sentiment.score("the film was", " bad")
    self.assertAlmostEqual(parts["negative"], 3.5 / 6.5, delta=6e-4)
    _, parts = sentiment.score("", "")
    shares = [parts[name] for name in ("positive", "negative", "neutral")]
    self.assertEqual(shares, [0, 0, 0])

  def test_a_handful_of_praise_is_enough(self):
    self.assertGreater(sentiment.score("", "love great best win")[0], 0.9)

  def test_parts_are_ones_own(self):
    _, first = sentiment.score("so", " good")
    first["compound"] = None
    _, again = sentiment.score("so", " good")
    self.assertIsNotNone(again["compound"])

  def test_through_the_protocol(self):
    task = tasks.load("sentiment")
    scores, parts = tasks.score_all(task, ["a", "a"], [" good", " bad"])
    self.assertGreater(scores[0], 0)
    self.assertLess(scores[1], 0)
    means = answers.mean_parts(parts)
    self.assertAlmostEqual(means["compound"], scores.mean(), places=6)
    self.assertEqual(means["is_cut"], 0)

  def test_not_installed(self):
    sentiment._analyzer.cache_clear()
    self.addCleanup(sentiment._analyzer.cache_clear)
    with (
      mock.patch.object(importlib.util, "find_spec", lambda name: None),
      self.assertRaisesRegex(ValueError, "pip install vaderSentiment"),
    ):
      sentiment.score("a", "b")


@needs_vader
class HostileTest(parameterized.TestCase):
  @parameterized.parameters(
    ("a lol " * 10**5,),
    ("good " * 10**5 + "but ",),
    ("but good " * 10**5,),
    ("x " * 900 + "very good ",),
    ("!" * 10**6,),
    ("(" * 10**6,),
    ("😁" * 10**5,),
    ("😁x" * 10**5,),
    ("\ud800\x00\u202e" * 10**5,),
    ("not " * 10**5 + "good",),
  )
  def test_costs_little(self, text):
    started = time.perf_counter()
    compound, parts = sentiment.score("it was", text)
    # A tenth of that on an idle machine.
    self.assertLess(time.perf_counter() - started, 2)
    self.assertBetween(compound, -1, 1)
    self.assertEqual(parts["is_cut"], len(text) > sentiment.MAX_CHARACTERS)

  def test_cut(self):
    room = sentiment.MAX_CHARACTERS
    whole = "a" * (room - 5) + " good"
    compound, parts = sentiment.score("", whole)
    self.assertGreater(compound, 0)
    self.assertFalse(parts["is_cut"])
    compound, parts = sentiment.score("a", whole)
    self.assertEqual(compound, 0)
    self.assertTrue(parts["is_cut"])
    # "beaming face with smiling eyes" and a blank.
    self.assertLen(sentiment._readable("😁" * room), room // 31)

  def test_same_in_another_process_and_order(self):
    texts = ["good", "bad!", "😁 not so GREAT", "it is the worst but i love it"]
    first = [sentiment.score("", text) for text in texts]
    sentiment._verdict.cache_clear()
    again = [sentiment.score("", text) for text in reversed(texts)]
    self.assertEqual(first, again[::-1])
    # As another process had them.
    scores = [score for score, _ in first]
    self.assertEqual(scores, [0.4404, -0.5848, -0.4246, 0.6428])

  @hypothesis.given(
    text=st.text(st.characters(codec=None), max_size=200), reads=st.booleans()
  )
  def test_any_text(self, text, reads):
    compound, parts = sentiment.score(
      "so good", text, reads="response" if reads else "text"
    )
    self.assertBetween(compound, -1, 1)
    shares = [parts[name] for name in ("positive", "negative", "neutral")]
    for share in shares:
      self.assertBetween(share, 0, 1)
    total = sum(shares)
    self.assertTrue(total == 0 or abs(total - 1) < 2e-3, total)


if __name__ == "__main__":
  absltest.main()

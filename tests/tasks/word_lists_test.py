"""Tests of the word lists: what is asked, what is logged, what it is worth."""

import collections
import functools
import itertools
import tempfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from absl.testing import parameterized

from rljax import tasks
from rljax.tasks import word_lists
from rljax.text import batches, encoding, keywords, logged, tokens

PROMPT = "birds 4 not duck owl:"
# (reply, reward, share of its words that belong, number of words).
SCORES = (
  (" dove hawk wren lark", 1.0, 1.0, 4),
  # The forbidden duck counts for nothing: three of four.
  (" dove duck wren lark", 3 / 4, 3 / 4, 4),
  # Said twice, it counts once, and belongs both times.
  (" dove dove wren lark", 3 / 4, 1.0, 4),
  # Too long: four of five or six, be the others good or foreign.
  (" dove hawk wren lark crow", 4 / 5, 1.0, 5),
  (" dove hawk wren lark lark", 4 / 5, 1.0, 5),
  (" dove hawk fig wren fig lark", 4 / 6, 4 / 6, 6),
  # Too short: two of the four that were asked for.
  (" dove hawk", 2 / 4, 1.0, 2),
  ("", 0.0, 0.0, 0),
  (" \n ", 0.0, 0.0, 0),
  # Foreign words, punctuation and capitals.
  (" axe fig red tin", 0.0, 0.0, 4),
  (" dove, hawk; Wren lark", 1 / 4, 1 / 4, 4),
  ("dove  hawk\nwren\tlark ", 1.0, 1.0, 4),
)


@functools.cache
def _every(split):
  """Every prompt of a split: a draw as large as all of them has each."""
  return frozenset(word_lists.prompts(split, 0, num=2640))


@functools.cache
def _rows(agreement=0.75):
  return word_lists.logged("train", 3, num=1500, agreement=agreement)


class PromptsTest(parameterized.TestCase):
  def test_splits(self):
    splits = [_every(split) for split in word_lists.SPLITS]
    # 8 topics, 5 lengths, and 66 pairs of their 12 words.
    self.assertLen(frozenset().union(*splits), 2640)
    self.assertEqual(sum(map(len, splits)), 2640)
    np.testing.assert_allclose(
      [len(prompts) / 2640 for prompts in splits], [0.8, 0.1, 0.1], atol=0.02
    )
    # None lacks a topic or a length.
    for prompts in splits:
      self.assertLen({tuple(prompt.split()[:2]) for prompt in prompts}, 40)

  def test_a_split_is_for_good(self):
    # Another hash of the prompts would let old test prompts into new training.
    self.assertIn("birds 4 not crow dove:", _every("train"))
    sizes = [len(_every(split)) for split in word_lists.SPLITS]
    self.assertEqual(sizes, [2117, 256, 267])

  def test_form(self):
    for prompt in _every("test"):
      self.assertRegex(prompt, r"^[a-z]+ [2-6] not [a-z]+ [a-z]+:$")
      topic, _, _, first, second = prompt.removesuffix(":").split()
      words = word_lists.TOPICS[topic].split()
      self.assertLess(words.index(first), words.index(second))

  def test_draws(self):
    first = word_lists.prompts("validation", 1, num=100)
    self.assertEqual(first, word_lists.prompts("validation", 1, num=100))
    self.assertNotEqual(first, word_lists.prompts("validation", 2, num=100))
    # A longer draw begins like a shorter one, and repeats nothing too early.
    size = len(_every("validation"))
    longer = word_lists.prompts("validation", 1, num=2 * size + 10)
    self.assertLen(longer, 2 * size + 10)
    self.assertEqual(longer[:100], first)
    self.assertEqual(set(longer[:size]), _every("validation"))
    self.assertEqual(set(longer[size : 2 * size]), _every("validation"))
    self.assertNotEqual(longer[:size], longer[size : 2 * size])

  @parameterized.parameters(
    word_lists.prompts, word_lists.logged, word_lists.supervised
  )
  def test_unknown_split(self, function):
    with self.assertRaisesRegex(
      ValueError, "the splits train, validation, test, got 'dev'"
    ):
      function("dev", 0)

  def test_no_word_has_two_topics(self):
    words = " ".join(word_lists.TOPICS.values()).split()
    self.assertLen(words, 96)
    self.assertLen({*words, *word_lists.TOPICS, "not"}, 96 + 8 + 1)
    for line in word_lists.TOPICS.values():
      self.assertLen(line.split(), 12)

  def test_known_as_a_task(self):
    self.assertIs(tasks.load("word_lists"), word_lists)
    keywords.check(word_lists.logged, {"num": 3, "agreement": 1.0})


class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(*SCORES)
  def test_hand_computed(self, reply, expected, on_topic, num_words):
    reward, parts = word_lists.score(PROMPT, reply)
    self.assertAlmostEqual(reward, expected)
    self.assertEqual(
      parts,
      {
        "is_correct": expected == 1,
        "on_topic": on_topic,
        "words": num_words,
      },
    )

  @hypothesis.given(st.text())
  def test_any_text(self, text):
    reward, parts = word_lists.score(PROMPT, text)
    self.assertBetween(reward, 0, 1)
    self.assertBetween(parts["on_topic"], 0, 1)
    self.assertFalse(parts["is_correct"])  # Nobody hits on four birds.

  @hypothesis.given(
    st.lists(st.sampled_from(word_lists._ALL[:14]), max_size=8),
    st.sampled_from(sorted(_every("test"))),
    st.randoms(use_true_random=False),
  )
  def test_properties(self, words, prompt, random):
    reward, parts = word_lists.score(prompt, " ".join(words))
    shuffled = random.sample(words, len(words))
    self.assertEqual(
      word_lists.score(prompt, " ".join(shuffled)), (reward, parts)
    )
    # One more copy of what was said helps nobody.
    if words:
      again, _ = word_lists.score(prompt, " ".join([*words, words[0]]))
      self.assertLessEqual(again, reward)
    topic, num, _, *forbidden = prompt.removesuffix(":").split()
    belongs = set(word_lists.TOPICS[topic].split()) - set(forbidden)
    is_right = set(words) <= belongs and len(words) == len(set(words))
    self.assertEqual(reward == 1.0, is_right and len(words) == int(num))
    self.assertEqual(parts["is_correct"], reward == 1.0)

  @parameterized.parameters(
    ("",),
    ("1+2=",),
    ("planets 4 not duck owl:",),
    ("birds 7 not duck owl:",),
    ("birds 04 not duck owl:",),
    ("birds four not duck owl:",),
    ("birds 4 but duck owl:",),
    ("birds 4 not duck:",),
    ("birds 4 not duck owl wren:",),
  )
  def test_bad_prompt(self, prompt):
    with self.assertRaisesRegex(ValueError, "birds 4 not duck owl:.*, got '"):
      word_lists.score(prompt, " dove")


class SolutionTest(parameterized.TestCase):
  def test_is_right_and_not_always_the_same(self):
    rng = np.random.default_rng(0)
    replies = [word_lists.solution(PROMPT, rng) for _ in range(50)]
    for reply in replies:
      self.assertEqual(word_lists.score(PROMPT, reply)[0], 1.0)
    self.assertGreater(len(set(replies)), 40)


class LoggedTest(parameterized.TestCase):
  def test_rows(self):
    rows = _rows()
    self.assertEqual(
      [row["prompt"] for row in rows], word_lists.prompts("train", 3, num=1500)
    )
    for row in rows:
      self.assertLen(row["candidates"], 2)
      for reply, reward in zip(row["candidates"], row["rewards"], strict=True):
        self.assertEqual(reward, word_lists.score(row["prompt"], reply)[0])
        self.assertBetween(len(reply.split()), 1, word_lists.MAX_WORDS)
        self.assertStartsWith(reply, " ")
    # The door that every offline script goes through takes them.
    self.assertLen(logged.from_rows(rows, "word_lists"), 1500)

  def test_draws(self):
    first = word_lists.logged("test", 1, num=20)
    self.assertEqual(first, word_lists.logged("test", 1, num=20))
    self.assertNotEqual(first, word_lists.logged("test", 2, num=20))
    self.assertEqual(first[:5], word_lists.logged("test", 1, num=5))
    # Whoever is preferred, the replies are the same.
    other = word_lists.logged("test", 1, num=20, agreement=0.0)
    for row, turned in zip(first, other, strict=True):
      self.assertCountEqual(row["candidates"], turned["candidates"])

  def test_share_of_right_replies_rises(self):
    rights = collections.defaultdict(list)
    for row in _rows():
      rights[row["prompt"].split()[0]] += [r == 1 for r in row["rewards"]]
    shares = [np.mean(rights[topic]) for topic in word_lists.TOPICS]
    # From 5 % to 50 % by design; careless replies may be right by chance. Of
    # the 370 replies to a topic, two standard deviations are 5 %.
    designed = np.linspace(0.05, 0.5, 8)
    np.testing.assert_allclose(shares, designed, atol=0.08)
    self.assertLess(np.mean(shares[:2]), np.mean(shares[3:5]))
    self.assertLess(np.mean(shares[3:5]), np.mean(shares[6:]))

  def test_shades_below(self):
    rewards = np.ravel([row["rewards"] for row in _rows()])
    # Some are worth nothing, and every quarter of the range has its share.
    self.assertGreater(np.mean(rewards == 0), 0.03)
    counts, _ = np.histogram(rewards, bins=4, range=(0, 1))
    self.assertGreater(counts.min(), 0.05 * rewards.size)

  @parameterized.parameters((1.0, 1.0, 0.0), (0.75, 0.75, 0.04), (0.0, 0, 0))
  def test_agreement(self, agreement, expected, tolerance):
    rewards = np.array([row["rewards"] for row in _rows(agreement)])
    first, second = rewards[rewards[:, 0] != rewards[:, 1]].T
    self.assertGreater(first.size, 1000)
    self.assertAlmostEqual(
      np.mean(first > second), expected, delta=tolerance + 1e-9
    )

  def test_supervised(self):
    rows = word_lists.logged("validation", 5, num=30, agreement=0.9)
    self.assertEqual(
      word_lists.supervised("validation", 5, num=30, agreement=0.9),
      [(row["prompt"], row["candidates"][0]) for row in rows],
    )


class TokenizerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    pytest.importorskip("tokenizers")
    self.tokenizer = word_lists.word_tokenizer()

  def test_one_token_a_word(self):
    self.assertEqual(
      self.tokenizer.tokenize("birds 4 not duck owl: dove"),
      ["birds", "4", "not", "duck", "owl", ":", "dove"],
    )
    ids = self.tokenizer.encode("birds 4")
    self.assertEqual(
      self.tokenizer.convert_ids_to_tokens(ids), ["<bos>", "birds", "4"]
    )
    # 8 topics, 96 words, 5 numbers, "not", ":" and three of its own.
    self.assertLen(self.tokenizer, 114)

  def test_every_prompt_comes_back(self):
    prompts = list(itertools.chain(*map(_every, word_lists.SPLITS)))
    encoded = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    back = self.tokenizer.batch_decode(
      encoded, clean_up_tokenization_spaces=False
    )
    self.assertEqual([text.replace(" :", ":") for text in back], prompts)
    self.assertEqual({len(ids) for ids in encoded}, {6})

  def test_every_logged_reply_comes_back(self):
    rows = logged.from_rows(_rows()[:300], "word_lists")
    encoded = encoding.encode(
      self.tokenizer,
      rows,
      max_prompt_length=7,
      max_response_length=word_lists.MAX_WORDS + 1,
      too_long="error",
    )
    for row, responses in zip(rows, encoded.response_ids, strict=True):
      for reply, ids in zip(row.candidates, responses, strict=True):
        self.assertEqual(ids[-1], self.tokenizer.eos_token_id)
        ids, mask = batches.pad_right([ids])
        # The blank in front is no token; the score does without it.
        (text,) = tokens.decode(self.tokenizer, ids, mask)
        self.assertEqual(text, reply.lstrip())

  def test_no_unknown_words(self):
    for text in ("planets 4 not mars venus:", "birds 7 not duck owl:"):
      with self.assertRaisesRegex(ValueError, "cannot encode '(pl|bi)"):
        tokens.encode_prompts(self.tokenizer, [text], max_length=9)

  def test_saved_and_loaded(self):
    import transformers

    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.tokenizer.save_pretrained(folder)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    self.assertEqual(loaded.get_vocab(), self.tokenizer.get_vocab())
    self.assertEqual(loaded.encode(PROMPT), self.tokenizer.encode(PROMPT))
    self.assertEqual(loaded.eos_token_id, self.tokenizer.eos_token_id)

"""Responses as ids: exact behind their prompts, with one end token or none."""

import functools
import logging

import hypothesis
import hypothesis.strategies as st
import numpy as np
import tokenizers
import transformers
from absl.testing import parameterized

from rljax.tasks import arithmetic
from rljax.text import (
  chat,
  chats,
  encoding,
  forms,
  steps,
  tokens,
  vocabularies,
)
from tests import conftest

WORDS = arithmetic.word_tokenizer()
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
CORPUS = [
  "Once upon a time there was a cat . The cat sat on a mat.",
  "1 + 1 = 2, 12 = 3 * 4\n\n  two blanks",
] * 4
# Chat templates that put an end token behind a turn, and a line feed.
TEMPLATE = (
  "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>\n{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# One that leaves out what the assistant said before the user's last turn.
FORGETFUL = (
  "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}"
  "[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def _fast(backend, **names):
  names = {"bos_token": "<s>", "eos_token": "</s>", **names}
  return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _pieces(scheme=None, normalizer=None, strips=False):
  """SentencePiece-like: single characters, a few words and bytes."""
  words = [*SPECIAL, *BYTES, "▁", *"Oncepuaot1=.", "▁a", "on", "▁upon", "▁Once"]
  merges = [("▁", "a"), ("o", "n")]
  words = list(dict.fromkeys(words))
  model = tokenizers.models.BPE(
    {word: i for i, word in enumerate(words)},
    merges,
    unk_token="<unk>",
    byte_fallback=True,
  )
  backend = tokenizers.Tokenizer(model)
  decoders = tokenizers.decoders
  if scheme is not None:
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
      prepend_scheme=scheme, split=False
    )
  if normalizer is not None:
    backend.normalizer = normalizer
  inner = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  backend.decoder = decoders.Sequence(
    [*inner, *([decoders.Strip(" ", 1, 0)] if strips else [])]
  )
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  return _fast(backend, unk_token="<unk>")


def _byte_level(add_prefix_space):
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=add_prefix_space
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=330,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=SPECIAL,
    show_progress=False,
  )
  backend.train_from_iterator(CORPUS, trainer)
  return _fast(backend)


def _unigram(scheme):
  """As T5 and XLM-R have it."""
  vocabulary = [(word, 0.0) for word in SPECIAL]
  vocabulary += [(byte, -9.0) for byte in BYTES]
  vocabulary += [("▁", -2.0), ("▁upon", -3.0), ("▁a", -3.0)]
  vocabulary += [(letter, -4.0) for letter in "Oncepuaot1=."]
  backend = tokenizers.Tokenizer(
    tokenizers.models.Unigram(vocabulary, unk_id=0, byte_fallback=True)
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
    prepend_scheme=scheme
  )
  decoders = tokenizers.decoders
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  return _fast(backend, unk_token="<unk>")


@functools.cache
def _family(name):
  normalizers = tokenizers.normalizers
  blanks = normalizers.Replace(" ", "▁")
  if name == "stories":
    folder = conftest.shared("data/models/stories260k")
    return transformers.AutoTokenizer.from_pretrained(folder)
  return {
    "gpt2": lambda: _byte_level(False),
    "gpt2_prefix": lambda: _byte_level(True),
    "llama2": lambda: _pieces(
      normalizer=normalizers.Sequence([normalizers.Prepend("▁"), blanks]),
      strips=True,
    ),
    "gemma": lambda: _pieces(normalizer=blanks),
    "mistral": lambda: _pieces("first", strips=True),
    "metaspace": lambda: _pieces("always", strips=True),
    "unigram": lambda: _unigram("always"),
    "unigram_never": lambda: _unigram("never"),
  }[name]()


FAMILIES = (
  *("gpt2", "gpt2_prefix", "llama2", "gemma", "mistral", "metaspace"),
  *("unigram", "unigram_never", "stories"),
)
TEXT = st.text(
  st.one_of(st.sampled_from(" \nOnceupat1=."), st.sampled_from("é漢🙂\t<")),
  max_size=9,
)


def _whole(tokenizer, ids):
  return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _row(prompt="1+2=", candidates=("3",), **fields):
  values = {"rewards": None, "value": None, "advantage": None}
  values |= {"place": "here", "response_ids": None}
  return forms.Row(prompt, tuple(candidates), **values | fields)


def _encode(tokenizer, rows, **options):
  limits = {"max_prompt_length": 99, "max_response_length": 99}
  return encoding.encode(tokenizer, rows, **limits | options)


class ExactTest(parameterized.TestCase):
  @parameterized.product(
    family=FAMILIES,
    texts=(("Once ", "upon"), ("Once", " upon"), ("1=", "1"), ("a\n", "on")),
  )
  def test_boundaries(self, family, texts):
    self._check(_family(family), *texts)

  @parameterized.parameters(*FAMILIES)
  def test_any_texts(self, family):
    tokenizer = _family(family)

    @hypothesis.settings(max_examples=60)
    @hypothesis.given(prompt=TEXT, response=TEXT)
    def holds(prompt, response):
      if prompt or tokenizer.bos_token_id in tokenizer.encode(""):
        self._check(tokenizer, prompt, response)

    holds()

  def _check(self, tokenizer, prompt, response):
    (prompt_ids,) = tokens.encode_prompts(tokenizer, [prompt], max_length=99)
    found = tokens.encode_response(tokenizer, prompt, prompt_ids, response)
    self.assertTrue(found.is_exact)
    self.assertEqual(found.ids[-1], tokenizer.eos_token_id)
    before = _whole(tokenizer, prompt_ids)
    both = _whole(tokenizer, [*prompt_ids, *found.ids[:-1]])
    self.assertEqual(both, before + response)

  def test_what_a_tokenizer_cannot_write_is_counted(self):
    # A vocabulary of two words, with one for all others.
    backend = tokenizers.Tokenizer(
      tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, "<unk>")
    )
    backend.decoder = tokenizers.decoders.Fuse()
    words = _fast(backend, bos_token=None, unk_token="<unk>")
    with self.assertLogs("absl", logging.WARNING):
      encoded = _encode(words, [_row("a", ("B",)), _row("a", ("</s>",))])
    self.assertEqual(
      encoded.notes,
      [
        "1 of 2 responses were encoded apart from prompts.",
        "1 of 2 responses do not decode, behind their prompts, to their texts.",
      ],
    )

  def test_steps_behind_tags(self):
    tokenizer = _family("stories")
    tag = tokenizer.encode("a", add_special_tokens=False)[-1]
    ids, _ = steps.encode_tagged(tokenizer, [("a", "upon\n")], {"a": tag})
    self.assertEqual(_whole(tokenizer, ids[:-1]), "aupon\n")


class DecodeBehindTest(parameterized.TestCase):
  @parameterized.parameters(*FAMILIES)
  def test_the_blank_in_front_is_kept(self, family):
    tokenizer = _family(family)
    (prompt_ids,) = tokens.encode_prompts(tokenizer, ["Once"], max_length=9)
    ids = tokens.encode_response(tokenizer, "Once", prompt_ids, " upon").ids
    ids, mask = np.array([ids]), np.ones((1, len(ids)), bool)
    self.assertEqual(
      tokens.decode(tokenizer, ids, mask, behind=True), [" upon"]
    )

  def test_each_row_has_its_own_front(self):
    tokenizer = _family("stories")
    ids = tokenizer.encode("Once", add_special_tokens=False)
    ids, mask = np.array([ids, ids]), np.ones((2, len(ids)), bool)
    found = tokens.decode(tokenizer, ids, mask, behind=np.array([True, False]))
    self.assertEqual(found, [" Once", "Once"])
    mask[1] = False
    np.testing.assert_array_equal(
      vocabularies.has_text(tokenizer, ids, mask), [True, False]
    )
    start = np.array([[tokenizer.bos_token_id]])
    self.assertFalse(vocabularies.has_text(tokenizer, start, start > 0).any())

  def test_ids_of_a_rollout_are_used_either_way(self):
    tokenizer = _family("stories")
    ids = tuple(tokenizer.encode("upon", add_special_tokens=False))
    for text in ("upon", " upon"):
      encoded = _encode(tokenizer, [_row("Once", (text,), response_ids=ids)])
      self.assertEqual(encoded.response_ids, [[list(ids)]])


class EndTest(parameterized.TestCase):
  @parameterized.parameters(
    ("3</s>",), ("3</s>\n",), ("3</s></s>",), ("3 </s> </s>",), ("3",)
  )
  def test_no_second_end_token(self, text):
    tokenizer = _family("stories")
    (prompt_ids,) = tokens.encode_prompts(tokenizer, ["1+2="], max_length=99)
    ids = tokens.encode_response(tokenizer, "1+2=", prompt_ids, text).ids
    self.assertEqual(ids.count(tokenizer.eos_token_id), 1)
    self.assertEqual(ids[-1], tokenizer.eos_token_id)
    encoded = _encode(tokenizer, [_row(candidates=(text, f"4{text}"))])
    for ids in encoded.response_ids[0]:
      self.assertEqual(ids.count(tokenizer.eos_token_id), 1)
    # Nor does what scores or shows the reply see it.
    (row,) = encoded.rows
    self.assertEqual([x.strip() for x in row.candidates], ["3", "43"])

  def test_one_inside_is_counted(self):
    rows = [_row(candidates=("3</s>4", "3")), _row(candidates=("3",))]
    with self.assertLogs("absl", logging.WARNING) as logs:
      encoded = _encode(_family("stories"), rows)
    self.assertIn(
      "1 of 3 responses have an end token before their end.", encoded.notes
    )
    self.assertIn(encoded.notes[-1], logs.output[-1])

  def test_cut_replies_have_none(self):
    rows = [
      _row(candidates=("3", "4"), finished=(True, False)),
      _row(candidates=("5",), finished=(False,)),
    ]
    encoded = _encode(WORDS, rows)
    self.assertEqual(encoded.response_ids, [[[3, 104], [4]], [[5]]])
    self.assertEqual(
      encoded.notes, ["2 of 3 responses were cut, and get no end token."]
    )


class DialogueTest(parameterized.TestCase):
  MESSAGES = tuple(
    {"role": role, "content": content}
    for role, content in (
      ("user", "1=1"),
      ("assistant", "Once upon"),
      ("user", "a"),
      ("assistant", "on"),
    )
  )

  def _prepare(self, template, messages=MESSAGES, **options):
    tokenizer = _family("gpt2")
    tokenizer.chat_template = template
    row = forms.parse({"messages": list(messages)}, "here")
    limits = {"max_prompt_length": 99, "max_response_length": 99}
    encoded = encoding.prepare(
      tokenizer, [row], prompt_format="chat", **limits | options
    )
    return tokenizer, encoded

  def test_whole_texts(self):
    _, turns = self._prepare(TEMPLATE, all_turns=True)
    _, whole = self._prepare(TEMPLATE, all_turns=True, assistant_only=False)
    (prompt,), ((text,),) = whole.prompt_ids, whole.response_ids
    self.assertEqual(
      prompt + text, turns.prompt_ids[0] + turns.response_ids[0][0]
    )
    self.assertLen(prompt, 1)
    self.assertEqual(whole.learnt, [None])  # All of it.

  def test_all_turns(self):
    tokenizer, encoded = self._prepare(TEMPLATE, all_turns=True)
    (prompt,), ((ids,),) = encoded.prompt_ids, encoded.response_ids
    (learnt,) = encoded.learnt
    self.assertLen(learnt, len(ids))
    prompt = _whole(tokenizer, prompt)
    self.assertEqual(prompt, "[user]1=1</s>\n[assistant]")
    pieces = [_whole(tokenizer, [*ids[:n]]) for n in range(len(ids) + 1)]
    said = "".join(
      after[len(before) :]
      for before, after, is_learnt in zip(
        pieces, pieces[1:], learnt, strict=False
      )
      if is_learnt
    )
    self.assertEqual(said, "Once upon</s>on</s>")
    self.assertEqual(
      pieces[-1], "Once upon</s>\n[user]a</s>\n[assistant]on</s>"
    )
    batch = encoding.batch(
      encoded, [0], [0], prompt_length=64, response_length=64
    )
    self.assertEqual(batch["learnt_mask"].sum(), sum(learnt))
    self.assertEqual(batch["response_mask"].sum(), len(ids))
    empty = encoding.batch(
      encoded, [0], [1], prompt_length=64, response_length=64
    )
    self.assertFalse(empty["learnt_mask"].any())

  def test_the_last_turn_alone(self):
    tokenizer, encoded = self._prepare(TEMPLATE)
    self.assertEqual(encoded.learnt, [None])
    self.assertEqual(
      _whole(tokenizer, encoded.response_ids[0][0]).strip(), "on</s>"
    )
    batch = encoding.batch(
      encoded, [0], [0], prompt_length=64, response_length=64
    )
    self.assertNotIn("learnt_mask", batch)

  def test_one_turn_is_as_any_other_reply(self):
    _, several = self._prepare(TEMPLATE, self.MESSAGES[:2], all_turns=True)
    _, one = self._prepare(TEMPLATE, self.MESSAGES[:2])
    self.assertEqual(several.response_ids, one.response_ids)

  def test_a_template_that_changes_earlier_turns(self):
    with self.assertLogs("absl", logging.WARNING):
      _, encoded = self._prepare(FORGETFUL, all_turns=True)
    self.assertEqual(encoded.learnt, [None])
    self.assertRegex(encoded.notes[-1], "1 of 1 dialogues are written anew")

  def test_what_is_cut(self):
    _, encoded = self._prepare(
      TEMPLATE, all_turns=True, max_response_length=2, too_long="cut"
    )
    self.assertLen(encoded.response_ids[0][0], 2)
    self.assertEqual(encoded.learnt, [[True] * 2])

  def test_taken_rows_keep_it(self):
    _, encoded = self._prepare(TEMPLATE, all_turns=True)
    self.assertEqual(encoding.take(encoded, [0, 0]).learnt, encoded.learnt * 2)

  def test_spans(self):
    tokenizer = _family("gpt2")
    tokenizer.chat_template = TEMPLATE
    row = forms.parse({"messages": list(self.MESSAGES)}, "here")
    first, parts = chats.spans(row, chat.Template(tokenizer))
    self.assertEqual(first, "[user]1=1</s>\n[assistant]")
    self.assertEqual(
      parts,
      [
        ("Once upon</s>", True),
        ("\n[user]a</s>\n[assistant]", False),
        ("on</s>", True),
      ],
    )

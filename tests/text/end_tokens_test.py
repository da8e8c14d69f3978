"""Tests of the tokens that end a response."""

from absl.testing import parameterized

from rljax.models import tokenizers as model_tokenizers
from rljax.tasks import arithmetic
from rljax.tasks import tokenizers as words_tokenizers
from rljax.text import (
  chat,
  encoding,
  end_tokens,
  forms,
  prompts,
  steps,
  tokens,
  vocabularies,
)
from tests.text import toy_tokenizers

WORDS = arithmetic.word_tokenizer()


class EndTokensTest(parameterized.TestCase):
  TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
  )

  def _tokenizer(self, template=TEMPLATE):
    tokenizer = toy_tokenizers.byte_level_bpe()
    tokenizer.add_special_tokens(
      {"additional_special_tokens": ["<|start|>", "<|turn|>"]}
    )
    tokenizer.chat_template = template
    return tokenizer

  def test_the_end_of_a_turn(self):
    tokenizer = self._tokenizer()
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    self.assertEqual(end_tokens.turn_end(tokenizer), turn)
    eos = tokenizer.eos_token_id
    self.assertEqual(end_tokens.stop_ids(tokenizer), (eos, turn))
    self.assertEqual(
      end_tokens.stop_ids(tokenizer, (7, eos), None, 9), (eos, turn, 7, 9)
    )
    self.assertIsNone(end_tokens.turn_end(self._tokenizer(None)))

  @parameterized.parameters(
    "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    "{% for m in messages %}{{ m.content }}<think>{% endfor %}",
    "{{",
  )
  def test_templates_without_one(self, template):
    self.assertIsNone(end_tokens.turn_end(self._tokenizer(template)))

  def test_a_config_may_have_the_only_end(self):
    tokenizer = words_tokenizers.of_words(["a"], ".")
    tokenizer.eos_token = None
    self.assertEqual(end_tokens.stop_ids(tokenizer, [1, 2]), (1, 2))
    with self.assertRaisesRegex(ValueError, r"an end token \(eos_token\)"):
      end_tokens.stop_ids(tokenizer, None)

  def test_rows_of_a_chat_end_in_the_end_of_a_turn(self):
    tokenizer = self._tokenizer()
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    rows = [forms.Row("a", ("b",), None, None, None, "it:1", None)]
    limits = {"max_prompt_length": 99, "max_response_length": 99}
    pairs = {"pairs": [("a", "b")], "max_length": 99}
    for prompt_format, end in (
      ("chat", turn),
      (chat.describe("chat", options={"x": 1}), turn),
      ("plain", tokenizer.eos_token_id),
    ):
      encoded = encoding.prepare(
        tokenizer, rows, prompt_format=prompt_format, **limits
      )
      self.assertEqual(encoded.response_ids[0][0][-1], end)
      ((_, response),) = prompts.encode_pairs(
        tokenizer, prompt_format=prompt_format, **pairs
      )
      self.assertEqual(response[-1], end)
      self.assertEqual(response.count(end), 1)

  def test_an_end_that_the_config_alone_names(self):
    tokenizer = self._tokenizer(None)
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    ids = tokens.encode_prompts(tokenizer, ["a"], max_length=9)[0]
    encode = lambda: (
      tokens.encode_response(tokenizer, "a", ids, "b<|turn|>").ids
    )
    self.assertEqual(encode()[-2:], [turn, tokenizer.eos_token_id])
    model_tokenizers.add_ends(tokenizer, [turn, 10**6])
    self.assertEqual(encode()[1:], [turn])
    self.assertEqual(
      end_tokens.stop_ids(tokenizer), (tokenizer.eos_token_id, turn)
    )

  def test_the_last_step_ends_once(self):
    tokenizer = self._tokenizer()
    turn, tag = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|start|>"])
    pairs = [("t", "1\n"), ("t", "2<|turn|>\n")]
    encode = lambda pairs, **options: steps.encode_tagged(
      tokenizer, pairs, {"t": tag}, **options
    )[0]
    self.assertEqual(encode(pairs).count(turn), 1)
    self.assertEqual(encode(pairs)[-1], turn)
    self.assertEqual(encode(pairs[:1])[-1], tokenizer.eos_token_id)
    self.assertEqual(encode(pairs[:1], end_id=turn)[-1], turn)

  def test_named_ids(self):
    tokenizer = self._tokenizer()
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    newline = tokenizer.encode("\n")
    self.assertEqual(
      end_tokens.named_ids(tokenizer, ["<|turn|>", "\n", "<think>", "7", "7"]),
      (turn, *newline, tokenizer.convert_tokens_to_ids("<think>"), 7),
    )
    self.assertEqual(end_tokens.named_ids(tokenizer, []), ())
    for name in ("<|none|>", "999999", "9" * 99, "", "漢", "-1"):
      with self.assertRaisesRegex(ValueError, "tokens of|no token with the id"):
        end_tokens.named_ids(tokenizer, [name])
    with self.assertRaisesRegex(ValueError, "tokens of"):
      end_tokens.named_ids(WORDS, ["neverseen"])

  def test_ids_beyond_the_model(self):
    with self.assertRaisesRegex(ValueError, "has the id 120, and the model"):
      vocabularies.allowed_tokens(WORDS, 120, (104, 120))

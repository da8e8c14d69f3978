"""Chat templates: what they write, and what is caught."""

import types
from unittest import mock

import tokenizers
from absl.testing import absltest, parameterized

from rljax.text import asked, chat, chats, logged, templates

TEMPLATE = (
  "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
  "{% if enable_thinking is defined and not enable_thinking %}<no/>{% endif %}"
)
USER = {"role": "user", "content": "2+2"}


def _tokenizer(template):
  from transformers import PreTrainedTokenizerFast

  made = PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE())
  )
  made.chat_template = template
  return made


def _render(template, messages, prompt_format="chat"):
  return chat.render(messages, chat.parse(prompt_format, _tokenizer(template)))


class ChatTest(parameterized.TestCase):
  def test_as_transformers_renders_it(self):
    tokenizer = _tokenizer(TEMPLATE)
    found = chat.render([USER], chat.parse("chat", tokenizer))
    self.assertEqual(found, "[user]2+2[assistant]")
    self.assertEqual(
      found,
      tokenizer.apply_chat_template(
        [USER], tokenize=False, add_generation_prompt=True
      ),
    )

  def test_system_prompt_and_variables(self):
    described = chat.describe(
      "chat", system_prompt="Be brief.", options={"enable_thinking": False}
    )
    self.assertEqual(
      _render(TEMPLATE, [USER], described),
      "[system]Be brief.[user]2+2[assistant]<no/>",
    )
    # The row's own system message stays.
    own = {"role": "system", "content": "Be long."}
    self.assertEqual(
      _render(TEMPLATE, [own, USER], described),
      "[system]Be long.[user]2+2[assistant]<no/>",
    )

  def test_the_assistant_goes_on(self):
    begun = {"role": "assistant", "content": "It is"}
    self.assertEqual(
      _render(TEMPLATE, [USER, begun]), "[user]2+2[assistant]It is"
    )

  @parameterized.parameters(
    ("A fixed text. Brief.", "leaves out the message of the user"),
    ("{{ messages[-1].content }}", "leaves out the message of the system"),
    ("{{ raise_exception('no') }}", "no"),
    ("{{ messages[7].content.x.y }}", "no element 7|undefined|has no"),
    (
      "{% for m in messages %}{{ m.content * 99999 }}{% endfor %}",
      "wrote .* characters",
    ),
  )
  def test_what_a_template_does_wrong(self, template, message):
    described = chat.describe("chat", system_prompt="Brief.")
    with self.assertRaisesRegex(ValueError, message):
      _render(template, [USER], described)

  def test_a_template_without_an_end(self):
    endless = (
      "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
      "{% endfor %}{{ messages[0].content }}"
    )
    self.enterContext(mock.patch.object(templates, "SECONDS", 0.2))
    with self.assertRaisesRegex(ValueError, "took more than 0.2 seconds"):
      _render(endless, [USER])

  def test_plain_has_no_template(self):
    self.assertIsNone(chat.parse("plain", None))
    with self.assertRaisesRegex(ValueError, "need --prompt_format=chat"):
      chat.describe("plain", system_prompt="x")
    with self.assertRaisesRegex(ValueError, 'must be "plain" or "chat"'):
      chat.parse("html", None)
    with self.assertRaisesRegex(ValueError, "has no chat template"):
      chat.parse("chat", types.SimpleNamespace(chat_template=None))

  def test_rendered_rows_remember_what_was_given(self):
    row = logged.from_prompts([asked.Prompt("q", [USER], {"gold": 4})], "t")[0]
    (rendered,), _ = chats.render([row], _tokenizer(TEMPLATE), "chat")
    self.assertEqual(rendered.prompt, "[user]2+2[assistant]")
    self.assertEqual(asked.given(rendered.prompt), [USER])
    self.assertEqual(asked.columns(rendered.prompt), {"gold": 4})


if __name__ == "__main__":
  absltest.main()

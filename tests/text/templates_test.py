"""Tests of chat templates, which are programs that others wrote."""

import signal
import threading

from absl.testing import absltest, parameterized

from rljax.tasks import tokenizers
from rljax.text import chats, templates

ASKED = [{"role": "user", "content": "a"}]
LOOP = "{% for i in range(9999) %}" * 4 + "{% set x = i %}" + "{% endfor %}" * 4


def _tokenizer(template):
  tokenizer = tokenizers.of_words(["a"], ".")
  tokenizer.chat_template = template
  return tokenizer


class RenderTest(parameterized.TestCase):
  def test_render(self):
    template = (
      "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
      "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = _tokenizer(template)
    self.assertEqual(templates.render(tokenizer, ASKED), "user: a\n")
    self.assertEqual(
      templates.render(tokenizer, ASKED, add_generation_prompt=True),
      "user: a\nassistant:",
    )

  def test_a_loop_without_an_end(self):
    before = signal.getsignal(signal.SIGALRM)
    with self.assertRaisesRegex(ValueError, "took more than 0.2 seconds"):
      templates.render(_tokenizer(LOOP), ASKED, seconds=0.2)
    self.assertEqual(signal.getsignal(signal.SIGALRM), before)
    self.assertEqual(signal.getitimer(signal.ITIMER_REAL), (0.0, 0.0))

  @parameterized.parameters(
    ("{{ 'a' * 10**11 }}", "too large a program"),
    ("{{ 'a' * 2**25 }}", "wrote 33554432 characters"),
    ("{% for i in range(10**9) %}{% endfor %}", ""),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too large a program"),
    ("{{ raise_exception('no such role') }}", "no such role"),
    ("{{ messages[7].content.x }}", ""),
    ("{{ ''.__class__.__mro__ }}{{ 1 / 0 }}", ""),
    ("{%", ""),
  )
  def test_what_goes_wrong(self, template, message):
    with self.assertRaisesRegex(ValueError, message):
      templates.render(_tokenizer(template), ASKED)

  def test_other_threads(self):
    found = []
    tokenizer = _tokenizer("{{ messages[0].content }}")
    thread = threading.Thread(
      target=lambda: found.append(templates.render(tokenizer, ASKED))
    )
    thread.start()
    thread.join()
    self.assertEqual(found, ["a"])

  def test_rows_are_refused_with_the_reason(self):
    with self.assertRaisesRegex(ValueError, "no such role"):
      chats.render_prompts(
        ["a"], "it", _tokenizer("{{ raise_exception('no such role') }}"), "chat"
      )


if __name__ == "__main__":
  absltest.main()

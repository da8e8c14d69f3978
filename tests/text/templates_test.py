"""Tests of chat templates, which are programs that others wrote."""

import resource
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
    ("{{ 9**9**9 }}", "takes powers"),
    ("{% set x = 9 ** 65 %}", "takes powers"),
    ("{{ (7)**(messages[0].content|length) }}", "takes powers"),
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

  @parameterized.parameters(
    ("{{ messages[0].content }}", "a"),
    # The arguments of a call are no powers, nor is text.
    ("{{ dict(**{'x': 2 ** 3})['x'] }} a ** b", "8 a ** b"),
    (LOOP, "took more than 2 seconds"),
    ("{{ 'a' * 10**11 }}", "too large a program"),
    ("{{ 'a' * 2**25 }}", "wrote 33554432 characters"),
  )
  def test_other_threads(self, template, expected):
    def render():
      try:
        found.append(templates.render(tokenizer, ASKED, seconds=2.0))
      except ValueError as error:
        found.append(str(error))
      for _ in range(1000):  # Nothing is raised later on.
        found.append("")

    found, tokenizer = [], _tokenizer(template)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    thread = threading.Thread(target=render)
    thread.start()
    thread.join(20.0)
    self.assertIn(expected, found[0])
    self.assertLen(found, 1001)
    self.assertEqual(resource.getrlimit(resource.RLIMIT_AS), limit)

  def test_rows_are_refused_with_the_reason(self):
    with self.assertRaisesRegex(ValueError, "no such role"):
      chats.render_prompts(
        ["a"], "it", _tokenizer("{{ raise_exception('no such role') }}"), "chat"
      )


if __name__ == "__main__":
  absltest.main()

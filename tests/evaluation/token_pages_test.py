"""Tests of rljax.evaluation.token_pages."""

import html.parser
import math
import pathlib
import re
import tempfile
import threading
import warnings
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import absltest, parameterized

from rljax.evaluation import token_pages
from rljax.tasks import arithmetic, word_lists
from rljax.text import encoding, logged

END = 256  # A special token, and in each tokenizer below.


class _Tokenizer:
  """As far as a page knows one: ids stand for bytes."""

  all_special_ids = (END,)

  def __init__(self, pieces):
    self._pieces = dict(enumerate(pieces))

  def decode(self, ids, *, skip_special_tokens, clean_up_tokenization_spaces):
    assert skip_special_tokens and not clean_up_tokenization_spaces
    found = b"".join(self._pieces.get(i, b"") for i in ids)
    return found.decode("utf-8", "replace")


BYTES = _Tokenizer([bytes([i]) for i in range(256)])


class _Reader(html.parser.HTMLParser):
  """What a browser would see: tags with attributes, and texts by place."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.tags, self.tokens, self.texts = [], [], {}
    self._open = []
    self.feed(text)
    self.close()
    assert not self._open, self._open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append((tag, attrs))
    if tag == "meta":
      return
    self._open.append((tag, attrs.get("class", "")))
    if tag == "div" and attrs.get("class") == "tokens":
      self.tokens.append([])
    elif tag == "span" and self._inside("tokens"):
      self.tokens[-1].append({"text": "", **attrs})
    elif tag == "i" and self._inside("tokens") and self.tokens[-1]:
      self.tokens[-1][-1].setdefault("marks", []).append(attrs.get("class"))

  def handle_endtag(self, tag):
    assert self._open.pop()[0] == tag

  def handle_data(self, data):
    for tag, kind in self._open:
      for place in (tag, f".{kind}"):
        self.texts[place] = self.texts.get(place, "") + data
    if self._inside("tokens") and any(t == "span" for t, _ in self._open):
      self.tokens[-1][-1]["text"] += data

  def _inside(self, kind):
    return any(kind == other for _, other in self._open)


class _PagesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.path = self.folder / "tokens.html"

  def _read(self, samples, title="Title", value_name="reward", **options):
    token_pages.write(
      self.path, title, samples, value_name=value_name, **options
    )
    return _Reader(self.path.read_text(encoding="utf-8"))

  def _tokens(self, *args, **options):
    """The tokens of a page of one sample."""
    (tokens,) = self._read(
      [token_pages.Sample("", token_pages.Tokens(*args))], **options
    ).tokens
    return tokens


class TokenTextsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("ascii", b"ab\n", ["a", "b", "\n"]),
    # A character stands at the token that completes it.
    ("two_bytes", "é".encode(), [token_pages.PART, "é"]),
    ("four_bytes", "a👍b".encode(), ["a", *[token_pages.PART] * 3, "👍", "b"]),
    # Bytes that no character begins with, and a character that is broken off:
    # only what follows tells that it will not be completed.
    ("invalid", b"a\xffb", ["a", token_pages.PART, "\ufffdb"]),
    ("invalid_last", b"a\xff", ["a", "\ufffd"]),
    ("broken", b"\xe2\x82a", [token_pages.PART, token_pages.PART, "\ufffda"]),
    ("cut", b"a\xe2\x82", ["a", token_pages.PART, "\ufffd"]),
    ("empty", b"", []),
  )
  def test_bytes(self, text, expected):
    self.assertEqual(token_pages.token_texts(BYTES, list(text)), expected)

  def test_a_special_token_has_no_text_and_ends_a_character(self):
    self.assertEqual(
      token_pages.token_texts(BYTES, [END, 0xE2, END, 0x82, END]),
      ["", "\ufffd", "", "\ufffd", ""],
    )

  def test_tokens_of_several_bytes(self):
    # The second completes one character and begins the next.
    tokenizer = _Tokenizer([b"x\xc3", b"\xa9\xf0\x9f", b"\x91\x8d!"])
    self.assertEqual(
      token_pages.token_texts(tokenizer, [0, 1, 2]), ["x", "é", "👍!"]
    )

  def test_words_that_are_joined_with_blanks(self):
    tokenizer = word_lists.word_tokenizer()
    text = "birds 2 not duck"
    ids = [
      *tokenizer.encode(text, add_special_tokens=False),
      tokenizer.eos_token_id,
    ]
    self.assertEqual(
      token_pages.token_texts(tokenizer, ids),
      ["birds", " 2", " not", " duck", ""],
    )
    # Also behind a special token.
    ids.insert(2, tokenizer.eos_token_id)
    self.assertEqual(
      token_pages.token_texts(tokenizer, ids),
      ["birds", " 2", "", " not", " duck", ""],
    )

  def test_characters(self):
    tokenizer = arithmetic.character_tokenizer()
    ids = [
      *tokenizer.encode("12+3=", add_special_tokens=False),
      tokenizer.eos_token_id,
    ]
    self.assertEqual(token_pages.token_texts(tokenizer, ids), [*"12+3=", ""])

  @hypothesis.given(
    st.lists(st.integers(0, 256), max_size=30), st.text(max_size=8)
  )
  def test_texts_join_to_the_whole(self, ids, text):
    ids = [*ids, *text.encode()]
    texts = token_pages.token_texts(BYTES, ids)
    self.assertLen(texts, len(ids))
    pieces, piece = [], b""
    for i in [*ids, END]:  # Specials are the only borders.
      if i == END:
        pieces.append(piece.decode("utf-8", "replace"))
        piece = b""
      else:
        piece += bytes([i])
    joined = "".join(t for t in texts if t != token_pages.PART)
    self.assertEqual(joined, "".join(pieces))

  def test_unknown_ids_have_no_text(self):
    self.assertEqual(
      token_pages.token_texts(BYTES, [97, 300, 98]), ["a", "", "b"]
    )


class MakeTest(_PagesTest):
  def test_from_ids_keeps_the_unmasked(self):
    tokens = token_pages.from_ids(
      BYTES,
      np.array([97, 98, 99, 0], np.int32),
      mask=np.array([True, False, True, False]),
      values=np.array([1, 2, 3, 4.0]),
      marked=np.array([False, False, True, True]),
    )
    self.assertEqual(tokens.texts, ["a", "c"])
    np.testing.assert_array_equal(tokens.values, [1, 3])
    np.testing.assert_array_equal(tokens.marked, [False, True])

  def test_from_arrays(self):
    ids = np.array([[97, END, 0], [98, 99, END]])
    samples = token_pages.from_arrays(
      BYTES,
      ["p", "q"],
      ids,
      np.array([[True, True, False], [True, True, True]]),
      np.arange(6.0).reshape(2, 3),
      facts=[{"reward": 1.0}, {"reward": 0.0}],
    )
    self.assertEqual([s.prompt for s in samples], ["p", "q"])
    self.assertEqual(
      [s.response.texts for s in samples], [["a", ""], ["b", "c", ""]]
    )
    np.testing.assert_array_equal(samples[1].response.values, [3, 4, 5])
    self.assertEqual(samples[1].facts, {"reward": 0.0})
    (first,) = token_pages.from_arrays(
      BYTES, ["p", "q"], ids, ids >= 0, ids * 1.0, limit=1
    )
    self.assertEqual((first.prompt, first.facts), ("p", {}))

  def test_with_rewrites(self):
    row = {
      "prompt": "p",
      "ids": [97, 98, END],
      "values": np.array([0.5, 0.0, -0.1]),
      "marked": [False, True, False],
      "facts": {"right": False},
    }
    rewrite = {"rewrite_ids": [97, END], "rewrite_marked": [True, False]}
    wrong, right = token_pages.with_rewrites(BYTES, [row | rewrite, row])
    self.assertEqual((wrong.prompt, wrong.facts), ("p", {"right": False}))
    self.assertEqual(wrong.response.texts, ["a", "b", ""])
    np.testing.assert_array_equal(wrong.response.values, [0.5, 0.0, -0.1])
    np.testing.assert_array_equal(wrong.response.marked, [False, True, False])
    self.assertEqual(wrong.rewrite.texts, ["a", ""])
    np.testing.assert_array_equal(wrong.rewrite.marked, [True, False])
    self.assertIsNone(wrong.rewrite.values)
    self.assertIsNone(right.rewrite)

  def test_from_log(self):
    tokenizer = word_lists.word_tokenizer()
    rows = logged.from_rows(
      [
        {"prompt": "birds", "response": " owl"},
        {
          "prompt": "fish",
          "candidates": [" eel", " cod"],
          "rewards": [1.0, 0.25],
        },
      ],
      "log",
    )
    encoded = encoding.encode(
      tokenizer, rows, max_prompt_length=4, max_response_length=4
    )
    log = encoding.Log(
      encoded=encoded,
      lengths=encoding.lengths(encoded),
      present=logged.present(rows),
      skipped=[],
      settings={},
    )
    samples = token_pages.from_log(
      tokenizer,
      log,
      np.array([1, 0]),
      np.array([1, 0]),
      np.array([[0.5, -1.0], [2.0, 3.0]]),
      {"advantages": np.array([0.125, 4.0])},
    )
    self.assertEqual([s.prompt for s in samples], ["fish", "birds"])
    self.assertEqual(
      [s.response.texts for s in samples], [["cod", ""], ["owl", ""]]
    )
    np.testing.assert_array_equal(samples[0].response.values, [0.5, -1])
    self.assertEqual(
      [s.facts for s in samples],
      [
        {"row": "log, row 1", "reward": 0.25, "advantages": 0.125},
        {"row": "log, row 0", "reward": None, "advantages": 4.0},
      ],
    )

  def test_spread(self):
    rows = np.array([3, 5, 8, 9, 20])
    for num, expected in (
      (1, [3]),
      (2, [3, 20]),
      (3, [3, 8, 20]),
      (9, [3, 5, 8, 9, 20]),
    ):
      np.testing.assert_array_equal(token_pages.spread(rows, num), expected)

  def test_shapes_that_differ(self):
    with self.assertRaisesRegex(ValueError, "values must hold one.* 2 tokens"):
      token_pages.Tokens(["a", "b"], [1.0])
    with self.assertRaisesRegex(ValueError, "marked must hold one"):
      token_pages.Tokens(["a"], None, [[True]])
    with self.assertRaisesRegex(ValueError, r"ids and values .* \(2,\) and"):
      token_pages.from_ids(BYTES, [1, 2], values=np.zeros(3))
    with self.assertRaisesRegex(ValueError, "ids and mask must have one shape"):
      token_pages.from_ids(BYTES, [[1, 2]])
    ids = np.zeros((2, 3), int)
    with self.assertRaisesRegex(ValueError, "one number of rows, got 1, 2, 2"):
      token_pages.from_arrays(BYTES, ["p"], ids, ids == 0, ids * 1.0)


class ColourTest(_PagesTest):
  def _shares(self, values, **options):
    """Of each token its class and how much of the full colour it has."""
    tokens = self._tokens(["x"] * len(values), values, **options)
    found = []
    for token in tokens:
      style = token.get("style", "--a:0")
      share = float(style.removeprefix("--a:")) / token_pages._MOST
      found.append((token.get("class"), round(share, 2)))
    return found

  def test_scale_of_the_data(self):
    self.assertEqual(
      self._shares([0.5, -0.25, 0.0, -0.5]),
      [("p", 1.0), ("n", 0.5), (None, 0.0), ("n", 1.0)],
    )

  def test_given_scale_is_not_exceeded(self):
    self.assertEqual(
      self._shares([0.5, -3.0, 2.0], scale=2),
      [("p", 0.25), ("n", 1.0), ("p", 1.0)],
    )

  def test_sides_may_differ(self):
    self.assertEqual(
      self._shares([0.1, -0.1, -0.2], scale=(0.1, 0.5)),
      [("p", 0.2), ("n", 1.0), ("n", 1.0)],
    )

  def test_legend_has_the_numbers(self):
    tokens = token_pages.Tokens(["x"] * 3, [0.25, -3.0, 0.1])
    page = self._read([token_pages.Sample("", tokens)], scale=(2, 0.5))
    self.assertEqual(page.texts[".legend"], "reward ≤ −20.5")
    page = self._read([token_pages.Sample("", tokens)])
    self.assertEqual(page.texts[".legend"], "reward −33")

  def test_values_are_told_in_full(self):
    tokens = self._tokens(["a", "b"], np.array([0.1, -1 / 3], np.float32))
    self.assertEqual(
      [token["title"] for token in tokens],
      ["reward 0.1, token 1", "reward -0.33333334, token 2"],
    )
    self.assertEqual(
      self._tokens(["a"], [1 / 3])[0]["title"], f"reward {1 / 3!r}, token 1"
    )

  def test_not_finite(self):
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      values = np.array([math.nan, math.inf, -math.inf, 0.2], np.float32)
      self.assertEqual(
        self._shares(values),
        [("x", 0.0), ("x", 0.0), ("x", 0.0), ("p", 1.0)],
      )
      page = self._read(
        [token_pages.Sample("", token_pages.Tokens(["a"] * 4, values))]
      )
    titles = [token["title"].split(",")[0] for token in page.tokens[0]]
    self.assertEqual(titles[:3], ["reward nan", "reward inf", "reward -inf"])
    self.assertIn("not finite: 3", page.texts[".legend"])
    # Nothing else is there to take a scale from.
    self.assertEqual(self._shares([math.nan]), [("x", 0.0)])
    self.assertEqual(self._shares([0.0, 0.0]), [(None, 0.0)] * 2)

  def test_tokens_without_values(self):
    tokens = self._tokens(["a", "b"], None, [False, True])
    self.assertEqual(
      tokens,
      [
        {"text": "a", "title": "token 1"},
        {"text": "b", "title": "token 2", "class": "m"},
      ],
    )

  def test_marks_and_their_name(self):
    tokens = token_pages.Tokens(["a", "b"], [1.0, 0.0], [True, True])
    page = self._read([token_pages.Sample("", tokens)], marked_name="dropped")
    self.assertEqual([t["class"] for t in page.tokens[0]], ["p m", "m"])
    self.assertIn("dropped", page.texts[".legend"])
    page = self._read(
      [token_pages.Sample("", token_pages.Tokens(["a"], [1.0], [False]))]
    )
    self.assertNotIn("edited", page.texts[".legend"])

  @parameterized.parameters(0, -1.0, math.nan, math.inf, ((1.0, 0.0),))
  def test_bad_scale(self, scale):
    with self.assertRaisesRegex(ValueError, "scale must be positive"):
      self._tokens(["a"], [1.0], scale=scale)
    self.assertEqual(list(self.folder.iterdir()), [])


class TextTest(_PagesTest):
  def test_blanks_and_line_feeds_are_marked_and_kept(self):
    tokens = self._tokens(
      ["a b", "\t", "x\n", "\n\n", "c\nd", "", token_pages.PART]
    )
    self.assertEqual(
      [(token["text"], token.get("marks")) for token in tokens],
      [
        ("a b", ["blank"]),
        ("\t", ["tab"]),
        # The line breaks after the token, whose mark shows that it has one.
        ("x", ["lf"]),
        ("", ["lf", "lf"]),
        ("c\nd", ["lf"]),
        ("", ["end"]),
        ("", ["part"]),
      ],
    )
    text = self.path.read_text()
    (shown,) = re.findall(r'class="tokens">(.*?)</div>', text, re.DOTALL)
    # What a browser copies is the sample.
    self.assertEqual(re.sub("<[^>]*>", "", shown), "a b\tx\n\n\nc\nd")

  def test_legend_of_symbols(self):
    page = self._read([token_pages.Sample("", token_pages.Tokens(["a", ""]))])
    self.assertIn("such as the end token", page.texts[".legend"])
    self.assertNotIn("part of", page.texts[".legend"])
    page = self._read(
      [token_pages.Sample("", token_pages.Tokens([token_pages.PART, "é"]))]
    )
    self.assertIn("part of a character", page.texts[".legend"])

  @parameterized.parameters(
    ("\x00", "⟨U+0000⟩"),
    ("\r", "⟨U+000D⟩"),
    ("\x1b[1m", "⟨U+001B⟩[1m"),
    ("\u202eabc", "⟨U+202E⟩abc"),  # Would turn the rest of the line around.
    ("\u200b", "⟨U+200B⟩"),
    ("\u2028", "⟨U+2028⟩"),
    ("\ud800", "⟨U+D800⟩"),  # No UTF-8 file can hold it.
    ("\U000e0041", "⟨U+E0041⟩"),
  )
  def test_hidden_characters_are_spelled(self, text, shown):
    page = self._read(
      [
        token_pages.Sample(
          text, token_pages.Tokens([text], [1.0]), facts={text: text}
        )
      ],
      title=text,
      value_name=text,
      notes=[text],
    )
    self.assertEqual(page.tokens[0][0]["text"], shown)
    self.assertEqual(page.tokens[0][0]["title"], f"{shown} 1.0, token 1")
    for place in ("title", "h1", ".prompt", "dt", "dd", "p"):
      self.assertEqual(page.texts[place], shown)

  def test_everything_is_escaped(self):
    evil = "</span><script>alert('\"')</script><img src=//x onerror=y>&lt;"
    tokens = token_pages.Tokens([evil], [1.0], [True])
    page = self._read(
      [token_pages.Sample(evil, tokens, tokens, {evil: evil})],
      title=evil,
      value_name=evil,
      marked_name=evil,
      notes=[evil],
    )
    self.assertEqual(page.tokens[0][0]["text"], evil)
    self.assertEqual(page.tokens[0][0]["title"], f"{evil} 1.0, token 1")
    for place in ("title", "h1", ".prompt", "dt", "dd", "p"):
      self.assertEqual(page.texts[place], evil)
    self.assertIn(evil, page.texts[".legend"])
    self.assertIn(evil, page.texts["small"])
    kinds = {tag for tag, _ in page.tags}
    self.assertEmpty(kinds & {"script", "img", "link", "iframe", "a"})

  @hypothesis.given(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.text("\"'<>&=/ \n-!\\`{}%", max_size=20),
  )
  def test_any_text_is_shown_as_it_is(self, text, other):
    texts = (text, other)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, "page.html")
      samples = [
        token_pages.Sample(
          text, token_pages.Tokens([text, text]), facts={"x": text}
        )
        for text in texts
      ]
      token_pages.write(path, text, samples, value_name=other)
      page = _Reader(path.read_text(encoding="utf-8"))
    for tokens, text in zip(page.tokens, texts, strict=True):
      self.assertLen(tokens, 2)
      hidden = [c for c in text if token_pages._is_hidden(c)]
      if not hidden and text not in ("", token_pages.PART):
        self.assertEqual(tokens[0]["text"], text.rstrip("\n"))

  def test_page_needs_nothing_else(self):
    page = self._read(
      [token_pages.Sample("p", token_pages.Tokens(["a"], [1.0]))]
    )
    policy = [a for t, a in page.tags if a.get("http-equiv")]
    self.assertEqual(
      policy,
      [
        {
          "http-equiv": "Content-Security-Policy",
          "content": "default-src 'none'; style-src 'unsafe-inline'",
        }
      ],
    )
    self.assertNotRegex(self.path.read_text(), r"https?:|url\(|@import|src=")
    # Braces of the style sheet are not those of a template.
    self.assertIn(
      ".n { background: rgb(213 94 0 / var(--a)); }", page.texts["style"]
    )


class PageTest(_PagesTest):
  def _sample(self, name):
    return token_pages.Sample(
      f"prompt {name}", token_pages.Tokens([name], [1.0])
    )

  def test_rewrite_stands_beside_the_sample(self):
    page = self._read(
      [
        token_pages.Sample(
          "1+1=",
          token_pages.Tokens(["3", ""], [-0.5, 0.0], [True, False]),
          token_pages.Tokens(["2", ""], None, [True, False]),
        ),
        self._sample("alone"),
      ]
    )
    texts = [[token["text"] for token in column] for column in page.tokens]
    self.assertEqual(texts, [["3", ""], ["2", ""], ["alone"]])
    self.assertEqual(page.tokens[0][0]["class"], "n m")
    self.assertEqual(page.tokens[1][0]["class"], "m")
    self.assertEqual(
      page.texts["h3"],
      "sample2 tokens, reward −0.5 to 0rewrite2 tokenssample1 token, reward 1",
    )

  def test_facts(self):
    facts = {
      "reward": np.float32(-0.25),
      "is_correct": np.bool_(False),
      "answer": None,
      "steps": np.int64(7),
      "bad": float("nan"),
      "long": "y" * 300,
      "list": [1, 2],
      "flag": True,
    }
    page = self._read(
      [token_pages.Sample("", token_pages.Tokens([]), facts=facts)]
    )
    self.assertEqual(page.texts["dt"], "".join(facts))
    self.assertEqual(
      page.texts["dd"], "−0.25nonone7nan" + "y" * 200 + "…[1, 2]yes"
    )

  def test_samples_without_tokens(self):
    page = self._read(
      [token_pages.Sample("", token_pages.Tokens([], np.zeros(0)))]
    )
    self.assertIn("no token", page.texts[".tokens"])
    page = self._read([])
    self.assertIn("No sample is there yet", page.texts["p"])
    self.assertEqual(page.texts[".count"], "0 of 0 shown")

  def test_limit_is_said(self):
    samples = [self._sample(str(i)) for i in range(60)]
    page = self._read(samples)
    self.assertLen(page.tokens, 50)
    self.assertEqual(page.texts[".count"], "50 of 60 shown")
    page = self._read(samples, limit=2, num_in_all=1000)
    self.assertEqual([t["text"] for [t] in page.tokens], ["0", "1"])
    self.assertEqual(page.texts[".count"], "2 of 1000 shown")
    with self.assertRaisesRegex(ValueError, "limit must be positive, got 0"):
      self._read(samples, limit=0)

  def test_scale_is_that_of_the_samples_shown(self):
    samples = [
      token_pages.Sample("", token_pages.Tokens(["a"], [value]))
      for value in (1.0, 9.0)
    ]
    page = self._read(samples, limit=1)
    self.assertEqual(page.texts[".legend"], "reward −11")

  def test_a_page_is_replaced_whole(self):
    self._read([self._sample("old")])
    old = self.path.read_text()
    with (
      mock.patch.object(pathlib.Path, "write_bytes", side_effect=OSError),
      self.assertRaises(OSError),
    ):
      self._read([self._sample("new")])
    self.assertEqual(self.path.read_text(), old)

    # A reader meets one page or the other, never a part.
    samples = {name: [self._sample(name * 20_000)] * 3 for name in ("a", "b")}
    wholes = set()
    for rows in samples.values():
      self._read(rows)
      wholes.add(self.path.read_text())
    stop, seen = threading.Event(), set()

    def look():
      while not stop.is_set():
        seen.add(self.path.read_text())

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(10):
      for rows in samples.values():
        token_pages.write(self.path, "Title", rows, value_name="reward")
    stop.set()
    reader.join()
    self.assertLessEqual(seen, wholes)
    self.assertEqual([p.name for p in self.folder.iterdir()], ["tokens.html"])

  def test_same_samples_make_the_same_page(self):
    self._read([self._sample("a")])
    first = self.path.read_bytes()
    self._read([self._sample("a")])
    self.assertEqual(self.path.read_bytes(), first)


if __name__ == "__main__":
  absltest.main()

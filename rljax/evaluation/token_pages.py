"""Pages of samples in which every token is coloured by a number.

A page is one HTML file without scripts or links. It shows the token rewards of
a generative reward model with the edited tokens underlined and the rewrite
beside the sample, the advantages of PPO, the weights of offline losses, or any
other number per token.

Tokens are text of a model. All of it is escaped, invisible and right-to-left
control characters are spelled out, and the page forbids the browser to run or
load anything.
"""

import dataclasses
import html
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rljax.storage import paths
from rljax.text import encoding

# The text of a token that is a part of a character which a later one completes.
PART = "\N{DOTTED CIRCLE}"
# What bytes decode to that are not a character, or not yet one.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# Marks are drawn by the style sheet. They are not part of the text, so that
# text copied from the page is the sample alone.
_LINE_FEED = '<i class="lf"></i>'
_WITHOUT_INK = {"": '<i class="end"></i>', PART: '<i class="part"></i>'}
# Control characters, also of the writing direction, halves of surrogate pairs,
# private characters and line ends other than line feeds.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
# A fact that is longer is cut.
_MAX_FACT = 200
# Opacity of the largest value's colour, on which text can be read on a white
# page and on a black one.
_MOST = 0.62


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
  """Holds the tokens of a text, their values, and which ones are marked.

  Attributes:
    texts: T texts; "" for a token without text, such as the end token.
    values: T numbers, or None for tokens without colour.
    marked: T bools, True where a token is underlined; None for nowhere.
  """

  texts: Sequence[str]
  values: Sequence[float] | np.ndarray | None = None
  marked: Sequence[bool] | np.ndarray | None = None

  def __post_init__(self):
    for name in ("values", "marked"):
      shape = np.shape(getattr(self, name))
      if getattr(self, name) is not None and shape != (len(self.texts),):
        raise ValueError(
          f"{name} must hold one entry for each of the {len(self.texts)} "
          f"tokens, got the shape {shape}."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
  """Holds one sample of a page.

  Attributes:
    prompt: text above the tokens.
    response: tokens of the sample.
    rewrite: tokens of the text beside it, or None.
    facts: name to number, truth value or text, shown above the sample.
  """

  prompt: str
  response: Tokens
  rewrite: Tokens | None = None
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
  """Returns the text that each token of a sequence adds.

  A character of several tokens, as byte-level tokenizers make them, belongs to
  the token that completes it. An earlier token that adds nothing else holds
  `PART`. Bytes that are not valid UTF-8 become U+FFFD.

  Args:
    tokenizer: Hugging Face tokenizer of any kind.
    ids: T token ids.

  Returns:
    T texts, "" for special and unknown tokens. Without the `PART`s they join to
    the text of the sequence, up to the U+FFFD of invalid UTF-8.
  """
  special = set(tokenizer.all_special_ids)
  ids = [int(token) for token in ids]

  def decode(first, end):
    return tokenizer.decode(
      ids[first:end],
      skip_special_tokens=True,
      clean_up_tokenization_spaces=False,
    )

  # The last tokens with text are decoded again before what follows: a blank may
  # be between two tokens and belong to neither.
  texts, start, following, num_told = [], 0, 0, 0
  for end in range(1, len(ids) + 1):
    text = decode(start, end)
    is_broken = text.endswith(_BROKEN)
    # A possible beginning of a character waits for the rest of it.
    waits = is_broken and end < len(ids) and ids[end] not in special
    if waits:
      text = text.rstrip(_BROKEN)
    added = text[num_told:]
    num_told += len(added)
    texts.append(added or (PART if waits else ""))
    if added and not waits:
      # After half a character, bytes would be read as its other half.
      start, following = (end if is_broken else following), end
      num_told = len(decode(start, end))
  return texts


def from_ids(
  tokenizer: Any,
  ids: Sequence[int] | np.ndarray,
  *,
  mask: np.ndarray | None = None,
  values: np.ndarray | None = None,
  marked: np.ndarray | None = None,
) -> Tokens:
  """Makes the tokens of one row of ids.

  Args:
    tokenizer: Hugging Face tokenizer of any kind.
    ids: `[T]` int.
    mask: `[T]` bool, True where a token counts; None for everywhere.
    values: `[T]` float or None; any array that numpy reads.
    marked: `[T]` bool or None.

  Returns:
    The unmasked tokens.

  Raises:
    ValueError: if shapes differ.
  """
  ids = np.asarray(ids, np.int64)
  keep = np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
  parts = {"mask": keep}
  for name, part in (("values", values), ("marked", marked)):
    if part is not None:
      parts[name] = np.asarray(part)
  for name, part in parts.items():
    if part.shape != ids.shape or ids.ndim != 1:
      raise ValueError(
        f"ids and {name} must have one shape [T], got {ids.shape} and "
        f"{part.shape}."
      )
  return Tokens(
    token_texts(tokenizer, ids[keep]),
    **{name: part[keep] for name, part in parts.items() if name != "mask"},
  )


def with_rewrites(
  tokenizer: Any, rows: Sequence[Mapping[str, Any]]
) -> list[Sample]:
  """Samples with another text beside each.

  Args:
    tokenizer: Hugging Face tokenizer of any kind.
    rows: mappings with `prompt`, and `ids`, `values` and `marked` of the
      sample's tokens; where there is another text, `rewrite_ids` and
      `rewrite_marked` of its tokens; and `facts`, see `Sample`.

  Raises:
    ValueError: as `from_ids`.
  """
  return [
    Sample(
      row["prompt"],
      from_ids(
        tokenizer,
        row["ids"],
        values=row["values"],
        marked=np.asarray(row["marked"], bool),
      ),
      from_ids(
        tokenizer,
        row["rewrite_ids"],
        marked=np.asarray(row["rewrite_marked"], bool),
      )
      if "rewrite_ids" in row
      else None,
      row["facts"],
    )
    for row in rows
  ]


def from_arrays(
  tokenizer: Any,
  prompts: Sequence[str],
  response_ids: np.ndarray,
  response_mask: np.ndarray,
  values: np.ndarray,
  *,
  facts: Sequence[Mapping[str, Any]] | None = None,
  limit: int | None = None,
) -> list[Sample]:
  """Makes the samples of a batch of responses.

  Args:
    tokenizer: Hugging Face tokenizer of any kind.
    prompts: N texts.
    response_ids: `[N, T]` int.
    response_mask: `[N, T]` bool, True where a token counts.
    values: `[N, T]` float, of the tokens.
    facts: N mappings, see `Sample`; None for none.
    limit: how many samples to make, from the front; None for all.

  Returns:
    At most N samples.

  Raises:
    ValueError: if the numbers of rows differ, and as `from_ids`.
  """
  ids, mask, values = map(np.asarray, (response_ids, response_mask, values))
  facts = [{}] * len(prompts) if facts is None else facts
  counts = [len(prompts), len(ids), len(mask), len(values), len(facts)]
  if len(set(counts)) > 1:
    raise ValueError(
      "prompts, ids, mask, values and facts must have one number of rows, got "
      f"{', '.join(map(str, counts))}."
    )
  return [
    Sample(
      prompts[i],
      from_ids(tokenizer, ids[i], mask=mask[i], values=values[i]),
      facts=facts[i],
    )
    for i in range(len(prompts) if limit is None else min(limit, len(prompts)))
  ]


def from_log(
  tokenizer: Any,
  log: encoding.Log,
  rows: Sequence[int],
  candidates: Sequence[int],
  values: np.ndarray,
  facts: Mapping[str, np.ndarray],
) -> list[Sample]:
  """Samples of logged replies.

  Args:
    tokenizer: Hugging Face tokenizer, of the log.
    log: where they stand.
    rows: N row numbers.
    candidates: N candidate numbers.
    values: `[N, T]` float, of the tokens.
    facts: name -> `[N]` numbers, shown beside the place of the row and the
      reward that stands in it.

  Returns:
    N samples.
  """
  batch = log.batch(np.asarray(rows), np.asarray(candidates))
  asked = [log.rows[i] for i in rows]
  return from_arrays(
    tokenizer,
    [row.prompt for row in asked],
    batch["response_ids"],
    batch["response_mask"],
    values,
    facts=[
      {"row": row.place, "reward": row.rewards and row.rewards[k]}
      | {name: column[i] for name, column in facts.items()}
      for i, (row, k) in enumerate(zip(asked, candidates, strict=True))
    ],
  )


def spread(rows: Sequence[int] | np.ndarray, num: int) -> np.ndarray:
  """Picks rows to look at from all over a data set.

  Args:
    rows: N row numbers, at least one.
    num: how many are picked; all, if there are fewer.

  Returns:
    `[min(N, num)]` of them in their order, the first and the last included if
    there are two or more.
  """
  rows = np.asarray(rows)
  num = min(num, len(rows))
  return rows[np.linspace(0, len(rows) - 1, num).astype(int)]


def write(
  path: str | os.PathLike[str],
  title: str,
  samples: Sequence[Sample],
  *,
  value_name: str,
  scale: float | Sequence[float] | None = None,
  marked_name: str = "edited",
  notes: Sequence[str] = (),
  limit: int = 50,
  num_in_all: int | None = None,
) -> None:
  """Writes a page of samples, whole or not at all.

  Blue tokens have positive values and orange ones negative values, with more
  colour the further from 0; beyond the scale they have the full colour.
  Hovering over a token shows its value.

  Args:
    path: the file, such as "tokens.html"; it replaces the one before.
    title: of the page.
    samples: what to show.
    value_name: what the values are, such as "advantage".
    scale: the magnitude with the full colour; or two of them, for values below
      0 and above; None for the largest on the page.
    marked_name: what underlined tokens are.
    notes: sentences above the samples.
    limit: how many samples to show, from the front: a browser is slow with a
      page of a hundred thousand tokens.
    num_in_all: how many there are, where `samples` are some of them. The page
      says how many it shows, and of how many.

  Raises:
    ValueError: if the limit or a part of the scale is not positive.
  """
  if limit < 1:
    raise ValueError(f"limit must be positive, got {limit}.")
  shown = samples[:limit]
  columns = [
    tokens
    for sample in shown
    for tokens in (sample.response, sample.rewrite)
    if tokens is not None
  ]
  values = [
    np.asarray(t.values, float) for t in columns if t.values is not None
  ]
  values = np.concatenate([np.zeros(0), *values])
  low, high = _scale(scale, values)
  num_in_all = len(samples) if num_in_all is None else num_in_all
  legend = _legend(value_name, low, high, values, columns, marked_name)
  body = "\n".join(
    _sample(i, sample, value_name, low, high)
    for i, sample in enumerate(shown, 1)
  )
  page = _PAGE.format(
    title=_text(title),
    style=_STYLE,
    count=f"{len(shown)} of {num_in_all} shown",
    notes="".join(f"<p>{_text(note)}</p>\n" for note in notes),
    legend=legend,
    body=body or "<p>No sample is there yet.</p>",
  )
  paths.write_whole(path, page)


def _scale(scale, values):
  """Returns the values of full colour: below 0 and above it, both positive."""
  if scale is None:
    magnitudes = np.abs(values[np.isfinite(values)])
    scale = float(magnitudes.max(initial=0.0)) or 1.0
  low, high = np.broadcast_to(scale, 2).tolist()
  if not (0 < low < math.inf and 0 < high < math.inf):
    raise ValueError(f"The scale must be positive and finite, got {scale}.")
  return low, high


def _legend(name, low, high, values, columns, marked_name):
  """Writes what the colours and the line below a token mean."""
  parts = []
  if values.size:
    finite = values[np.isfinite(values)]
    below = "≤ " if np.any(finite < -low) else ""
    above = "≥ " if np.any(finite > high) else ""
    parts.append(
      f'<span class="key">{_text(name)} '
      f"<span>{below}{_number(-low)}</span>"
      f'<span class="bar"></span><span>{above}{_number(high)}</span></span>'
    )
    if len(finite) < len(values):
      parts.append(
        '<span class="key"><span class="x">&nbsp;?&nbsp;</span> not finite: '
        f"{len(values) - len(finite)}</span>"
      )
  if any(t.marked is not None and np.any(t.marked) for t in columns):
    parts.append(
      f'<span class="key"><span class="m">&nbsp;a&nbsp;</span> '
      f"{_text(marked_name)}</span>"
    )
  if any(text == "" for t in columns for text in t.texts):
    parts.append(
      f'<span class="key">{_WITHOUT_INK[""]} no text, such as the end token'
      "</span>"
    )
  if any(text == PART for t in columns for text in t.texts):
    parts.append(
      f'<span class="key">{_WITHOUT_INK[PART]} part of a character</span>'
    )
  return "".join(parts)


def _sample(number, sample, name, low, high):
  """Writes one card: facts, prompt, the sample and what is beside it."""
  facts = "".join(
    f"<div><dt>{_text(str(key))}</dt><dd>{_text(_fact(value))}</dd></div>"
    for key, value in sample.facts.items()
  )
  texts = [("sample", sample.response)]
  if sample.rewrite is not None:
    texts.append(("rewrite", sample.rewrite))
  columns = "".join(
    f"<section><h3>{heading}{_summary(name, tokens)}</h3>"
    f'<div class="tokens">{_tokens(name, tokens, low, high)}</div></section>'
    for heading, tokens in texts
  )
  return (
    f"<article><header><b>{number}</b><dl>{facts}</dl></header>"
    f'<div class="prompt">{_text(sample.prompt)}</div>'
    f'<div class="columns">{columns}</div></article>'
  )


def _summary(name, tokens):
  """Counts tokens and gives their range, for readers without a pointer."""
  count = len(tokens.texts)
  parts = [f"{count} token{'' if count == 1 else 's'}"]
  if tokens.values is not None:
    values = np.asarray(tokens.values, float)
    values = values[np.isfinite(values)]
    if values.size:
      low, high = _number(values.min()), _number(values.max())
      parts.append(
        f"{_text(name)} {low}" + (f" to {high}" if high != low else "")
      )
  return f"<small>{', '.join(parts)}</small>"


def _tokens(name, tokens, low, high):
  """Writes the tokens, each in a span of its own."""
  if not len(tokens.texts):
    return '<i class="none">no token</i>'
  values = (
    [None] * len(tokens.texts) if tokens.values is None else tokens.values
  )
  marked = (
    np.zeros(len(values), bool) if tokens.marked is None else tokens.marked
  )
  found = []
  for i, (text, value, is_marked) in enumerate(
    zip(tokens.texts, values, marked, strict=True), 1
  ):
    classes, style, title = [], "", f"token {i}"
    if value is not None:
      number = float(value)
      # A float32 of 0.1 is 0.1 in its own precision.
      title = f"{_text(name)} {_text(str(value))}, {title}"
      if not math.isfinite(number):
        classes.append("x")
      elif number:
        share = min(1.0, number / high if number > 0 else -number / low)
        classes.append("p" if number > 0 else "n")
        style = f' style="--a:{share * _MOST:.3f}"'
    if is_marked:
      classes.append("m")
    # Line breaks that end a token come after it: inside they would leave an
    # empty piece of its colour on the next line.
    line = text.rstrip("\n")
    breaks = text[len(line) :]
    if text in _WITHOUT_INK:
      content = _WITHOUT_INK[text]
    else:
      content = "".join(map(_character, line)) + _LINE_FEED * len(breaks)
    kind = f' class="{" ".join(classes)}"' if classes else ""
    found.append(f'<span{kind}{style} title="{title}">{content}</span>{breaks}')
  return "".join(found)


def _character(character):
  """Writes one character of a token, with a mark if it has no ink."""
  if character == "\n":
    return f"{_LINE_FEED}\n"
  if character == "\t":
    return '<i class="tab"></i>\t'
  if unicodedata.category(character) == "Zs":
    return f'<i class="blank">{character}</i>'
  text = _text(character)
  return f"<i>{text}</i>" if _is_hidden(character) else text


def _text(text):
  """Escapes content and attributes, and spells out hidden characters."""
  return html.escape(
    "".join(f"⟨U+{ord(c):04X}⟩" if _is_hidden(c) else c for c in text)
  )


def _is_hidden(character):
  return character not in "\n\t" and unicodedata.category(character) in _HIDDEN


def _number(value):
  """Writes a short number with a sign that is as wide as a digit."""
  return f"{value:.3g}".replace("-", "−")


def _fact(value):
  """Writes the value of a fact."""
  if isinstance(value, (np.ndarray, np.generic)):
    value = value.tolist()
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, float):
    return f"{value:.4g}".replace("-", "−")
  text = "none" if value is None else str(value)
  return text if len(text) <= _MAX_FACT else f"{text[:_MAX_FACT]}…"


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e;
  --line: #d5dae0; --paper: #fff; --card: #fbfcfd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9ecef; --dim: #9ba5b0;
  --line: #363d45; --paper: #14171b; --card: #1a1e23; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem clamp(.6rem, 2vw, 2rem);
  background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.35rem; margin: .3rem 0; overflow-wrap: anywhere; }
h3 { font-size: .8rem; font-weight: 600; margin: 0 0 .3rem; }
p, .count, small, dt, .prompt::before { color: var(--dim); }
p { margin: .3rem 0; max-width: 60rem; font-size: .92rem; }
small { font-weight: 400; font-size: .8rem; margin-left: .6rem; }
.legend { position: sticky; top: 0; z-index: 1; display: flex;
  flex-wrap: wrap; gap: .25rem 1.6rem; padding: .5rem 0; font-size: .85rem;
  background: var(--paper); border-bottom: 1px solid var(--line); }
.key { display: inline-flex; align-items: center; gap: .45rem; }
.bar { position: relative; width: 9rem; height: .95rem; border-radius: 3px;
  border: 1px solid var(--line); background: linear-gradient(90deg,
  rgb(213 94 0 / MOST), rgb(213 94 0 / 0) 50%,
  rgb(0 114 178 / 0) 50%, rgb(0 114 178 / MOST)); }
.bar::after { content: "0"; position: absolute; inset: 0; text-align: center;
  font-size: .7rem; line-height: .85rem; color: var(--dim); }
article { margin: 1rem 0; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); overflow: hidden; }
header { display: flex; gap: .9rem; align-items: baseline;
  padding: .45rem .8rem; border-bottom: 1px solid var(--line);
  font-size: .85rem; }
header > b { color: var(--dim); }
dl { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: 0; }
dl div { display: flex; gap: .4rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.prompt, .tokens { white-space: pre-wrap; overflow-wrap: anywhere;
  font: .875rem/1.5rem ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; tab-size: 4; }
.prompt { padding: .5rem .8rem; max-height: 14rem; overflow: auto;
  line-height: 1.25rem; border-bottom: 1px solid var(--line);
  color: var(--dim); }
.columns { display: grid; gap: 1px; background: var(--line);
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
section { padding: .6rem .8rem .7rem; background: var(--card); min-width: 0; }
.p, .n, .x, .m { border-radius: 2px; padding: 2px 0; }
.p { background: rgb(0 114 178 / var(--a)); }
.n { background: rgb(213 94 0 / var(--a)); }
.x { background: repeating-linear-gradient(135deg, #8886 0 3px, #8882 3px 6px);
  outline: 1px dotted currentColor; }
.m { text-decoration: underline 2px; text-underline-offset: .25em;
  text-decoration-skip-ink: none; }
.p, .n, .x { margin-right: 1px; }
.tokens span:hover { outline: 2px solid currentColor; }
i { font-style: normal; opacity: .5; }
.none { font-style: italic; }
.blank { background: radial-gradient(circle, currentColor .06em,
  transparent .1em); }
.lf::before { content: "↵"; }
.tab::before { content: "→"; }
.end::before { content: "■"; }
.part::before { content: "◌"; }
@media (max-width: 44rem) { .legend { position: static; } }
@media print { * { print-color-adjust: exact; }
  article { break-inside: avoid; } .legend { position: static; } }
""".replace("MOST", str(_MOST))

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<div class="count">{count}</div>
{notes}<div class="legend">{legend}</div>
{body}
</body>
</html>
"""

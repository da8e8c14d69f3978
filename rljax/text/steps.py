"""Reasoning traces as texts: their steps, labels and duplicates.

A trace is a response; a step is one of its lines, with the line feed that ends
it, unless a task ends its steps by other characters. Rows are those of
`responders.collect`.
"""

import collections
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.text import (
  end_tokens,
  tokens,
)

Row = Mapping[str, Any]

# A calculation and its result, as in "48/2=24" or "$3 x (4 + 1) = 15", within a
# line. What stands before it, such as the number of the step, is not part of
# it. All repetitions are bounded, as the text is a model's.
_NUMBER = r"\$?-?(?:\d[\d,]{0,30}+(?:\.\d{1,30}+)?|\.\d{1,30}+)%?"
_OPERAND = rf"\({{0,5}}[ ]?{_NUMBER}[ ]?\){{0,5}}"
_EQUATION = re.compile(
  rf"{_OPERAND}(?:[ ]?[+\-*/x×÷][ ]?{_OPERAND}){{1,20}}[ ]?=[ ]?{_NUMBER}"
)


def whitespace_key(text: str) -> str:
  """Replaces every run of blanks and line feeds by one blank."""
  return " ".join(text.split())


def equation_key(text: str) -> str:
  """Returns the calculations of a trace in order, whatever is between.

  Two traces that calculate the same have the same key; one without any
  calculation has that of its text.

  Source:
    Yuan et al. (2023), "Scaling Relationship on Learning Mathematical
    Reasoning with Large Language Models", who call traces with the same list
    of equations the same.
  """
  equations = [
    re.sub(r"[\s$,]", "", found) for found in _EQUATION.findall(text)
  ]
  return ";".join(equations) or whitespace_key(text)


KEYS = {"text": whitespace_key, "equations": equation_key}


def is_kept(row: Row) -> bool:
  """Tells whether a sample is a demonstration: right, and not cut off."""
  return bool(row["finished"]) and bool(row["parts"].get("is_correct"))


def is_valid(row: Row) -> bool:
  """Whether a sample is right, ended, and its steps are valid as well."""
  return is_kept(row) and bool(row["parts"]["is_valid"])


def is_trusted(row: Row, *, threshold: float) -> bool:
  """Whether a sample ended in an answer that a reward model believes in.

  Args:
    row: with what the model says of it, as `reward_model`.
    threshold: the lowest of that, inclusive.
  """
  has_answer = row["parts"].get("answer") is not None
  return (
    bool(row["finished"]) and has_answer and row["reward_model"] >= threshold
  )


def add_distinct(
  kept: Sequence[Row],
  samples: Iterable[Row],
  *,
  keep: Callable[[Row], bool] = is_kept,
  key: Callable[[str], str] = whitespace_key,
  max_per_prompt: int = 0,
) -> tuple[list[Row], dict[str, int]]:
  """Adds the new traces of a round to those of expert iteration: D ∪ R.

  Every distinct trace of a prompt counts once, however often it was sampled:
  otherwise easy prompts, which give many copies, would dominate. Of traces
  with one key the first stays.

  Args:
    kept: D, rows with `prompt` and `response`.
    samples: rows of this round.
    keep: which of them belong to R.
    key: what makes two traces of a prompt the same.
    max_per_prompt: most traces of a prompt, those of D included; later ones
      are left out. 0: no limit.

  Returns:
    The rows of D, then the new ones; and how many samples were "wrong", were a
    "duplicate", were "over the limit" or are "new".
  """
  merged = list(kept)
  seen = {(row["prompt"], key(row["response"])) for row in merged}
  sizes = collections.Counter(row["prompt"] for row in merged)
  counts = dict.fromkeys(("wrong", "duplicate", "over the limit", "new"), 0)
  for row in samples:
    name = (row["prompt"], key(row["response"]))
    if not keep(row):
      counts["wrong"] += 1
    elif name in seen:
      counts["duplicate"] += 1
    elif max_per_prompt and sizes[row["prompt"]] >= max_per_prompt:
      counts["over the limit"] += 1
    else:
      counts["new"] += 1
      seen.add(name)
      sizes[row["prompt"]] += 1
      merged.append(row)
  return merged, counts


def solutions(samples: Sequence[Row], *, max_per_prompt: int = 0) -> list[Row]:
  """Each different solution once: samples that ended and have a step.

  Args:
    samples: rows.
    max_per_prompt: most right solutions of a prompt, and most wrong ones; 0: no
      limit.

  Returns:
    The right ones and behind them the wrong ones.
  """
  is_wrong = lambda row: row["finished"] and not is_kept(row)
  found = []
  for keep in (is_kept, is_wrong):
    found += add_distinct(
      [], samples, keep=keep, max_per_prompt=max_per_prompt
    )[0]
  return [row for row in found if steps(row["response"])]


def steps(response: str, ends: str = "\n") -> list[str]:
  """Splits a response into steps, each with the character that ends it.

  White space alone is not a step: it belongs to the step before it, or at the
  beginning to the first, so that the steps joined are the response. A response
  without any text has no step.

  Args:
    response: text.
    ends: characters that end a step, each of them on its own. With "\\n" the
      steps are the lines; with ";|" the text "12+5=17;3*17=51|A51" has the
      steps "12+5=17;", "3*17=51|" and "A51".

  Returns:
    Its steps.

  Raises:
    ValueError: if no character ends a step.
  """
  if not ends:
    raise ValueError('ends must be one or more characters, such as "\\n".')
  end = "".join(map(re.escape, ends))
  found: list[list[str]] = []  # Pieces, as adding strings is slow.
  has_text = False
  for piece in re.findall(rf"[^{end}]*[{end}]|[^{end}]+", response):
    if found and (not has_text or not piece.strip()):
      found[-1].append(piece)
    else:
      found.append([piece])
    has_text = has_text or bool(piece.strip())
  return ["".join(pieces) for pieces in found] if has_text else []


def prefixes(response: str, ends: str = "\n") -> list[str]:
  """Returns the text before the second, third, ... step: P_1 .. P_{L-1}."""
  parts = steps(response, ends)
  return ["".join(parts[:i]) for i in range(1, len(parts))]


def with_values(
  chosen: Sequence[Row],
  samples: Sequence[Row],
  values: Mapping[tuple[str, str], float],
) -> list[dict[str, Any]]:
  """Solutions with the values of their steps, as rows for a jsonl file.

  Args:
    chosen: the solutions, see `solutions`.
    samples: all samples that there are of their prompts.
    values: (prompt, prefix) -> share of right completions, for every one of
      `prefixes`.

  Returns:
    Rows with `prompt`, `response`, `reward`, `is_correct` and `finished`;
    `steps` s_1 .. s_L and their `values` V(P_1) .. V(P_L), where P_i is the
    prefix that includes step i, and the last is the solution's own verdict; and
    `start_value` V(P_0), the share of right samples of the prompt.
  """
  verdicts = collections.defaultdict(list)
  for row in samples:
    verdicts[row["prompt"]].append(is_kept(row))
  return [
    {
      "prompt": row["prompt"],
      "response": row["response"],
      "reward": float(is_kept(row)),
      "steps": steps(row["response"]),
      "values": [
        *(values[row["prompt"], p] for p in prefixes(row["response"])),
        float(is_kept(row)),
      ],
      "start_value": float(np.mean(verdicts[row["prompt"]])),
      "is_correct": is_kept(row),
      "finished": True,
    }
    for row in chosen
  ]


def value_labels(values: Sequence[float], *, threshold: float) -> list[bool]:
  """Labels a step good if enough completions of its prefix are right.

    g_i = V(P_i) ≥ θ,   P_i the prefix that includes step i

  Args:
    values: V(P_1) .. V(P_L), shares of right completions.
    threshold: θ, inclusive.

  Source:
    Havrilla et al. (2024), "Teaching Large Language Models to Reason with
    Reinforcement Learning", return-conditioned RL, with θ = 0.5.
  """
  return [value >= threshold for value in values]


def advantage_labels(
  values: Sequence[float], *, start_value: float
) -> list[bool]:
  """Labels a step good if it does not lower the value.

    g_i = V(P_i) - V(P_{i-1}) ≥ 0

  Args:
    values: V(P_1) .. V(P_L).
    start_value: V(P_0), of the prompt alone.
  """
  before = [start_value, *values[:-1]]
  return [value >= last for value, last in zip(values, before, strict=True)]


def possible_labels(values: Sequence[float]) -> list[bool]:
  """Labels a step good if some completion of it was right.

    g_i = ∃ j ≥ i: V(P_j) > 0

  A step from which nothing was right is good anyway if a later one was right:
  it did not prevent that. This approximates the value of the best policy, not
  of the one that sampled.

  Source:
    Havrilla et al. (2024), "GLoRe: When, Where, and How to Improve LLM
    Reasoning via Global and Local Refinements", the labels of stepwise
    outcome reward models, without their check that the completion uses the
    result of the step.
  """
  labels, later = [], False
  for value in reversed(values):
    later = later or value > 0
    labels.append(later)
  return labels[::-1]


def tagged(
  response: str,
  labels: Sequence[bool],
  *,
  tags: tuple[str, str],
  slot: str = "",
) -> list[tuple[str, str]]:
  """Puts a tag in front of each step of a response.

  Args:
    response: L steps.
    labels: L truth values.
    tags: of good steps, and of bad ones.
    slot: a text at the start of each step that the tag replaces; a step without
      it gets the tag in front.

  Returns:
    L pairs (tag, rest of the step). Empty lines are left out.
  """
  # A tag follows a line feed: there is one at the end of each step but the
  # last.
  parts = steps(response)
  texts = [step.strip("\n") + "\n" for step in parts[:-1]]
  texts += [step.strip("\n") for step in parts[-1:]]
  return [
    (tags[0] if is_good else tags[1], text.removeprefix(slot))
    for text, is_good in zip(texts, labels, strict=True)
  ]


def encode_tagged(
  tokenizer: Any,
  pairs: Iterable[tuple[str, str]],
  tag_ids: Mapping[str, int],
  *,
  end_id: int | None = None,
) -> tuple[list[int], list[bool]]:
  """Encodes tag, step, tag, step, ..., end; each step by itself.

  A last step that ends in the text of an end token, such as that of a turn, has
  it once.

  Args:
    tokenizer: Hugging Face tokenizer with an end token.
    pairs: of `tagged`.
    tag_ids: tag -> its one token.
    end_id: the end token, such as `end_tokens.end_id` in a chat; the
      tokenizer's own by default.

  Returns:
    The ids, and which of them are to be learnt: all but the tags, which the
    sampler puts there by itself.
  """
  ids: list[int] = []
  is_learnt: list[bool] = []
  pairs, end = list(pairs), None
  if pairs:
    tag, text = pairs[-1]
    text, end = end_tokens.without_end(tokenizer, text)
    pairs[-1] = (tag, text)
  for tag, text in pairs:
    step_ids = tokens.encode_behind(tokenizer, [tag_ids[tag]], text)
    ids += [tag_ids[tag], *step_ids]
    is_learnt += [False, *[True] * len(step_ids)]
  if end is None:
    end = tokenizer.eos_token_id if end_id is None else end_id
  return [*ids, end], [*is_learnt, True]


def forced_tag(token_bytes: Sequence[bytes], tag_id: int) -> np.ndarray:
  """Makes the sampler's table that puts a tag in front of every step.

  Args:
    token_bytes: V texts of tokens, from `vocabularies.token_bytes`.
    tag_id: token of the tag.

  Returns:
    `[V + 1]` int32: the tag behind every token that ends in a line feed, and at
    the start, which is the last entry; else -1, for none.
  """
  ends_step = [text.endswith(b"\n") for text in token_bytes]
  return np.where([*ends_step, True], tag_id, -1).astype(np.int32)


def describe_labels(rows: Sequence[Row]) -> str:
  """Says in a line how many steps are bad, by their position.

  Args:
    rows: with `is_correct`, and `good`, one truth value for each step.
  """
  num_right = sum(row["is_correct"] for row in rows)
  longest = max(len(row["good"]) for row in rows)
  shares = [
    np.mean([not row["good"][i] for row in rows if i < len(row["good"])])
    for i in range(longest)
  ]
  return (
    f"{len(rows)} solutions, {num_right} right; share of bad steps by "
    "position: " + " ".join(f"{share:.2f}" for share in shares[:8])
  )


def mix(
  is_correct: Sequence[bool], *, share: float, num_rows: int, seed: int
) -> np.ndarray:
  """Draws rows, none of them twice, of which a given share is right.

  Args:
    is_correct: `[N]`, one per row.
    share: of right ones in the result, rounded to whole rows.
    num_rows: size of the result; 0: as many as there can be.
    seed: of the draw.

  Returns:
    `[num_rows]` int64 indices, in random order.

  Raises:
    ValueError: if there are too few rows of one kind, or none at all.
  """
  if not 0 <= share <= 1:
    raise ValueError(f"share must lie in [0, 1], got {share}.")
  is_correct = np.asarray(is_correct, bool)
  right, wrong = np.flatnonzero(is_correct), np.flatnonzero(~is_correct)
  if not num_rows:
    most = [
      len(rows) / part
      for rows, part in ((right, share), (wrong, 1 - share))
      if part > 0
    ]
    # A little more, or .1 + .2 would count as a row less.
    num_rows = int(min(most) + 1e-9)
  if not num_rows:
    raise ValueError(
      f"There are not enough rows for a share of {share:.0%} right ones: "
      f"{len(right)} are right and {len(wrong)} wrong."
    )
  num_right = round(share * num_rows)
  for name, rows, number in (
    ("right", right, num_right),
    ("wrong", wrong, num_rows - num_right),
  ):
    if number > len(rows):
      raise ValueError(
        f"{num_rows} rows of which {share:.0%} are right need {number} {name} "
        f"ones; there are {len(rows)}."
      )
  rng = np.random.default_rng(seed)
  chosen = [
    rng.permutation(right)[:num_right],
    rng.permutation(wrong)[: num_rows - num_right],
  ]
  return rng.permutation(np.concatenate(chosen))

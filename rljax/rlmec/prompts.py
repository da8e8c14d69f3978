r"""Rewrites of wrong solutions with few edits, and what is learnt from them.

A wrong solution (the sample) is turned into a right one that changes as little
of it as possible, so that the edited tokens are the wrong ones. This module is
the text side of that: the steps of a sample and their labels, the questions
that a model is asked, and the records that a generative reward model learns
from.

A function that rewrites is a `Teacher`. Without a large model, `teachers` makes
the rewrite of the gold solution and the sample; with one, a plain function
does:

  def teacher(question, gold, wrong):
    template = prompts.TEMPLATES["instruction"]
    wrong_steps = steps.steps(wrong)
    reply = ask(template.locate_prompt(question, gold, wrong_steps))
    step = template.parse_location(reply)
    if not 0 <= step < len(wrong_steps):
      step = -1
    kept = prompts.retained(wrong_steps, step)
    reply = ask(template.rewrite_prompt(question, gold, wrong, kept))
    return prompts.join(kept, reply)

What a teacher returns is verified by the task's score before it is used. Text
of a model is parsed with bounds, and never executed.

Source:
  Chen et al. (2024), "Improving Large Language Models via Fine-grained
  Reinforcement Learning with Minimum Editing Constraint". Where the authors'
  code has errors, this module departs from it; each function says how.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.text import steps as steps_lib

Row = Mapping[str, Any]

# rewrite(question, gold, wrong) -> text: a right solution with few edits.
Teacher = Callable[[str, str, str], str]

_MAX_REPLY = 2**12  # Of a reply that names a step.


# Steps and their labels.


def step_ends(task: Any) -> str:
  """Returns the characters that end a step of a task's solutions."""
  return getattr(task, "STEP_ENDS", "\n")


def labelled(steps: Iterable[str]) -> str:
  """Writes steps as lines "[0] ...", "[1] ...", for a model to name one."""
  return "\n".join(
    f"[{i}] {' '.join(step.split())}" for i, step in enumerate(steps)
  )


_LABEL = re.compile(r"\[ {0,2}(-?[0-9]{1,6}) {0,2}\]")
_STEP = re.compile(
  r"\b(?:step|line|label)s?\b[ :#]{0,3}(-?[0-9]{1,6})(?![0-9]|[.,][0-9])",
  re.IGNORECASE,
)
_WHOLE = re.compile(r"(?<![0-9.,-])(-?[0-9]{1,6})(?![0-9]|[.,][0-9])")
_NO_FAULT = re.compile(
  r"\b(?:no|not any|without|free of) (?:\w{1,20} )?(?:error|mistake|fault)"
  r"|\bno (?:step|line)s? (?:is|are) (?:wrong|incorrect)|\bnothing is wrong",
  re.IGNORECASE,
)
_FAULT = re.compile(
  r"\bincorrect|\bwrong|\berror|\bmistake|\bfaulty|\bfalse"
  r"|(?:\bnot|n't|n’t) (?:\w{1,20} )?correct\b",
  re.IGNORECASE,
)
_CORRECT = re.compile(r"\bcorrect\b", re.IGNORECASE)
_CLAUSE = re.compile(r"[;\n]|[.,!?](?![0-9])")


def parse_step_label(text: str) -> int:
  """Reads which step a reply names as the first wrong one.

  The number is read whole: "step 12" is 12, and not 1. A label in brackets
  counts before "step 12", and that before a bare number. "Correct" means that
  there is none, whatever numbers stand next to it ("All 5 steps are correct");
  "incorrect" and "not correct" mean that there is one, although the word is in
  them. Clauses about a fault are read first: "[0] is correct, [1] is wrong" is
  1.

  Args:
    text: of a model; its first 4096 characters count.

  Returns:
    The number, which may be larger than the last step's; -1 if no step is
    named, or a negative one.
  """
  text = _NO_FAULT.sub(" correct ", text[:_MAX_REPLY])
  clauses = [c for c in _CLAUSE.split(text) if _FAULT.search(c)]
  if not clauses and _CORRECT.search(text):
    return -1
  for part in ("\n".join(clauses), text):
    for pattern in (_LABEL, _STEP, _WHOLE):
      found = pattern.search(part)
      if found:
        return max(int(found[1]), -1)
  return -1


def retained(steps: Sequence[str], error_step: int) -> str:
  """Returns the steps of a sample before its first wrong one.

  -1, no step named, keeps nothing: a slice up to -1 would keep all but the
  last step.

  Args:
    steps: of the sample, see `steps.steps`.
    error_step: index of the first wrong step, or -1.

  Returns:
    Their text, to which `join` adds a continuation.

  Raises:
    ValueError: if there is no such step.
  """
  if not -1 <= error_step < max(len(steps), 1):
    raise ValueError(
      f"error_step must be -1 or one of the sample's {len(steps)} steps, "
      f"counted from 0, got {error_step}."
    )
  return "".join(steps[: max(error_step, 0)])


def join(prefix: str, continuation: str) -> str:
  """Joins a retained prefix and a model's continuation.

  The white space between them is the sample's own, if the prefix ends in any;
  else that of the continuation, several line feeds made one. None comes before
  a continuation that begins the text. So no leading or doubled line feed counts
  as an edit, and rewrites look alike whatever was retained. Blanks after a line
  feed stay: some texts have a slot for a tag there.
  """
  text = continuation.lstrip()
  if prefix.endswith("\n"):
    return prefix + (continuation.lstrip("\r\n") if text else "")
  if not prefix or not text or prefix[-1].isspace():
    return prefix + text
  between = continuation[: len(continuation) - len(text)]
  return prefix + ("\n" if "\n" in between else between) + text


def first_changed_step(
  steps: Sequence[str], rewrite_steps: Sequence[str]
) -> int:
  """Finds the first step of a sample that its rewrite changes.

  This is the error step of a rewrite whose teacher names none. White space at
  the end of a step does not count.

  Returns:
    Its index; -1 if the rewrite has all steps of the sample and goes on.
  """
  pairs = itertools.zip_longest(steps, rewrite_steps[: len(steps)])
  for i, (old, new) in enumerate(pairs):
    if new is None or old.rstrip() != new.rstrip():
      return i
  return -1


# What a model is asked.


@dataclasses.dataclass(frozen=True)
class Template:
  """Asks a model for the first wrong step, and for a rewrite.

  A generative reward model is trained and asked by the same two methods. A
  rewrite begins right at the end of the prompt, whether or not steps are
  retained.

  Attributes:
    locate: format with {question}, {gold} and {steps}.
    target: format of the answer, with {k}.
    rewrite: format with {question}, {gold}, {response} and, at its end, {kept}.
    has_labels: whether {steps} are `labelled`, or the plain text.
  """

  locate: str
  target: str
  rewrite: str
  has_labels: bool

  def locate_prompt(
    self, question: str, gold: str, steps: Sequence[str]
  ) -> str:
    """Asks for the first wrong step of a sample, given as its steps."""
    text = labelled(steps) if self.has_labels else "".join(steps)
    return self.locate.format(question=question, gold=gold, steps=text)

  def locate_target(self, error_step: int) -> str:
    """Returns the answer to `locate_prompt`, as `parse_location` reads it.

    Raises:
      ValueError: if the step is negative. A sample without a wrong step has no
        target.
    """
    if error_step < 0:
      raise ValueError(f"error_step must be >= 0, got {error_step}.")
    return self.target.format(k=error_step)

  def parse_location(self, reply: str) -> int:
    """Reads the step that a reply names, or -1; see `parse_step_label`."""
    return parse_step_label(reply)

  def rewrite_prompt(
    self, question: str, gold: str, response: str, kept: str = ""
  ) -> str:
    """Asks for a rewrite that begins with the text `kept`."""
    return self.rewrite.format(
      question=question, gold=gold, response=response, kept=kept
    )


_INSTRUCTION = """\
Problem:
{question}

Reference solution:
{gold}

"""

TEMPLATES = {
  # For small models of characters, which have no words to instruct them by.
  "compact": Template(
    locate="{question}G{gold}P{steps}L",
    target="{k}",
    rewrite="{question}G{gold}P{response}R{kept}",
    has_labels=False,
  ),
  # The same for vocabularies without letters, such as that of merge sums.
  "lines": Template(
    locate="{question}\n{gold}\n\n{steps}\n=",
    target="{k}",
    rewrite="{question}\n{gold}\n\n{response}\n\n{kept}",
    has_labels=False,
  ),
  "instruction": Template(
    locate=(
      "A problem is given with a reference solution and a prediction, whose "
      "steps carry labels such as [0]. Which step of the prediction is the "
      "first that goes wrong? The prediction may solve the problem in another "
      "way than the reference; that is no error. Reply with the label alone, "
      'as in "The first error step is [2]", or with "correct" if there is '
      "no error.\n\n"
      + _INSTRUCTION
      + "Prediction, step by step:\n{steps}\n\nReply:\n"
    ),
    target="The first error step is [{k}]",
    rewrite=(
      "A problem is given with a reference solution and a prediction that may "
      "have mistakes. Correct them, and change as little as you can: copy "
      "every word and number of the prediction that can stay. It may solve "
      "the problem in another way than the reference; then keep its way. A "
      "prediction without mistakes is copied as it is.\n\n"
      + _INSTRUCTION
      + "Prediction:\n{response}\n\nCorrect prediction:\n{kept}"
    ),
    has_labels=True,
  ),
}


# Records.


def reward_model_records(
  rows: Iterable[Row],
  template: Template,
  *,
  seed: int,
  locate: bool = True,
  step_ends: str = "\n",
) -> tuple[list[dict[str, str]], dict[str, Any]]:
  """Makes the records that a generative reward model learns from.

    θ = N_rewrite / N

  Of a wrong sample whose rewrite is right there is a "rewrite" record and, if
  its first wrong step is known, a "locate" record. Of a right sample there is
  an "identity" record, its own text as the rewrite, with probability θ, so
  that they do not outnumber the others. N counts all rows.

  A sample is right by its own verdict. That no wrong step was named does not
  make it right: otherwise a wrong text would be learnt as an identity.

  Args:
    rows: with `prompt`, `gold`, `response`, `is_right`, `error_step` (-1 if
      none is named), `rewrite` and `is_verified` (is the rewrite right?).
    template: of the prompts.
    seed: of the draw of identity records.
    locate: whether there are "locate" records.
    step_ends: characters that end a step.

  Returns:
    Records with `kind`, `prompt` and `response`, in the order of the rows; and
    how many there are of each kind, how many wrong samples were dropped as
    "unverified", how many right ones were "not_drawn", how many locate records
    lack a valid step ("without_step"), and "theta".
  """
  rows = list(rows)
  is_fixed = [bool(row["is_verified"]) and not row["is_right"] for row in rows]
  theta = sum(is_fixed) / max(len(rows), 1)
  # One number per row: a row does not depend on the others' verdicts, but for
  # θ.
  draws = np.random.default_rng(seed).random(len(rows))
  counts = dict.fromkeys(
    (
      "locate",
      "rewrite",
      "identity",
      "unverified",
      "not_drawn",
      "without_step",
    ),
    0,
  )
  records = []

  def add(kind: str, prompt: str, response: str) -> None:
    counts[kind] += 1
    records.append({"kind": kind, "prompt": prompt, "response": response})

  for row, fixed, draw in zip(rows, is_fixed, draws, strict=True):
    question, gold, sample = row["prompt"], row["gold"], row["response"]
    prompt = template.rewrite_prompt(question, gold, sample)
    if row["is_right"]:
      if draw < theta:
        add("identity", prompt, sample)
      else:
        counts["not_drawn"] += 1
    elif not fixed:
      counts["unverified"] += 1
    else:
      steps = steps_lib.steps(sample, step_ends)
      if locate and 0 <= row["error_step"] < len(steps):
        add(
          "locate",
          template.locate_prompt(question, gold, steps),
          template.locate_target(row["error_step"]),
        )
      elif locate:
        counts["without_step"] += 1
      add("rewrite", prompt, row["rewrite"])
  return records, counts | {"theta": theta}


def distinct(samples: Iterable[Row]) -> tuple[list[Row], dict[str, int]]:
  """Drops samples without an end token, and repeated texts of a question.

  A text counts once per question: a short answer to one question does not
  suppress the same answer to another. A sample that ran out of length has no
  end token of its own and would be scored with one, so it is dropped.

  Args:
    samples: rows with `prompt`, `response` and `finished`.

  Returns:
    The rows kept, in their order; and how many were "unfinished", a
    "duplicate", or "kept".

  Raises:
    ValueError: if there are samples, but none has an end token.
  """
  kept, counts = steps_lib.add_distinct(
    [], samples, keep=lambda row: bool(row["finished"]), key=lambda text: text
  )
  if not kept and counts["wrong"]:
    raise ValueError(
      f"None of the {counts['wrong']} samples has an end token; give a larger "
      "--max_length, or a policy that ends its solutions."
    )
  return kept, {
    "unfinished": counts["wrong"],
    "duplicate": counts["duplicate"],
    "kept": counts["new"],
  }


def at_most_right(rows: Sequence[Row], limit: int, seed: int) -> list[Row]:
  """Caps the number of right samples per question, at random.

  Args:
    rows: with `prompt` and `is_right`, the sample's own verdict.
    limit: most right samples of a question; 0: no limit.
    seed: of the draw.

  Returns:
    The rows that stay, in their order.

  Raises:
    ValueError: if the limit is negative.
  """
  if limit < 0:
    raise ValueError(f"limit must be >= 0, got {limit}; 0 is no limit.")
  if not limit:
    return list(rows)
  right = collections.defaultdict(list)
  for i, row in enumerate(rows):
    if row["is_right"]:
      right[row["prompt"]].append(i)
  rng = np.random.default_rng(seed)
  dropped = {
    i for places in right.values() for i in rng.permutation(places)[limit:]
  }
  return [row for i, row in enumerate(rows) if i not in dropped]

"""Problems of the package reasoning-gym, whose generators check answers.

  prompts("train", 0, num=300, generator="chain_sum", max_terms=3,
          template="{expression}=")

asks "4 + 3 - 1=". Any generator of the package can be named, with its own
options; the few whose scorers cannot be trusted are refused, with the reason.

Three things differ from the package. Splits share no prompt, and no prompt is
repeated: the package's seeds 3 and 4 have all but one problem in common, and
small ranges repeat anyway. The score is 1 where the package's scorer gives full
marks, and 0 for its partial credits, some of which garbage earns too. And no
text of a model reaches a scorer that would run it as Python, or take hours over
it.

`pip install reasoning-gym` installs the package.
"""

import dataclasses
import hashlib
import re
import string
from typing import Any

from absl import logging

from rljax.tasks import tokenizers

SPLITS = ("train", "validation", "test")
# Longer responses are wrong.
MAX_CHARACTERS = 10_000

# Generators whose scorer cannot be used.
REFUSED = {
  "coin_flip": "its scorer accepts any prefix of an answer",
  "composite": "its parts are not plain options; name one of them",
  "game_of_life_halting": "its scorer accepts any answer",
  "intermediate_integration": "its scorer runs the answer as Python",
  "polynomial_multiplication": "its scorer runs the answer as Python",
  "propositional_logic": "its scorer tries all values of all names",
  "puzzle24": "its scorer accepts any numbers, and runs the answer as Python",
  "rubiks_cube": "its scorer plays a move as often as the answer says",
  "simple_integration": "its scorer runs the answer as Python",
}
# For generators whose scorer evaluates the answer, may work on it for hours, or
# accepts "nan": the form of all right answers.
ALPHABETS = {
  "binary_matrix": r"[0-9 \n]*",
  "complex_arithmetic": r"[0-9ij.+() -]*",
  # Without "**", and without names and strings.
  "countdown": r"(?!.*\*\*)[0-9+*/() -]{0,200}",
  "n_queens": r"[Q_ \n]*",
  "number_sorting": r"[][0-9.,'\" -]*",
  "spiral_matrix": r"[0-9 ]*",
  "string_insertion": r"[A-Z]*",
}
# Generators that iterate over sets of strings, and so draw other problems in
# every process: a resumed run does not repeat them.
UNREPEATABLE = (
  "isomorphic_strings",
  "knight_swap",
  "ransom_note",
  "word_ladder",
)

# A hash assigns every prompt to one of these.
_CELLS = ("train", "train", "validation", "test")
_CHUNK = 1024
_MAX_REPEATED = 10_000
_FIELDS = ("question", "expression")
# The first number of a text, and what may stand between it and its sign.
_FIRST_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?\b")
_MINUS = re.compile(r"(?:[-−–]|\b(?:minus|negative))[ $£€]*$", re.IGNORECASE)
_NUMBER = re.compile(r"\+?(-?)0*([0-9]+)(?:\.([0-9]*?)0*)?")

# Prompt -> its data set, which scores it, and its problem.
_drawn: dict[str, tuple[Any, dict[str, Any]]] = {}


def prompts(
  split: str,
  seed: int,
  *,
  num: int = 1024,
  generator: str = "chain_sum",
  template: str = "{question}",
  **config: Any,
) -> list[str]:
  """Draws different prompts, and remembers their answers for `score`.

  A hash of the prompt says which split it belongs to, whatever the seeds and
  options: half of them are for training, a quarter for validation and a quarter
    for tests, so that two to four problems are generated for each that is kept.
    A smaller `num` gives the first of the same prompts. Problems whose own
    answer the package's scorer rejects are left out, and counted in the log.

  Args:
    split: "train", "validation" or "test".
    seed: >= 0.
    num: number of prompts.
    generator: a name that the package registers, such as "chain_sum",
      "basic_arithmetic", "gcd" or "gsm_symbolic".
    template: text of a prompt, in which {question} stands for the problem's
      question, and {expression} for the formula in it, where there is one.
    **config: options of the generator, such as `max_terms`. Words separated by
      blanks make a list where the generator needs one.

  Returns:
    `num` texts.

  Raises:
    ValueError: if the package is missing; the generator or an option is unknown
      or cannot be used; the template needs a field that the problem lacks; or
      there are not `num` different prompts, or one has two different answers.
  """
  found = _draw(split, seed, num, generator, template, config)
  for prompt, (dataset, entry) in found.items():
    _remember(prompt, dataset, entry)
  return list(found)


def supervised(
  split: str,
  seed: int,
  *,
  num: int = 1024,
  generator: str = "gsm_symbolic",
  template: str = "{question}",
  **config: Any,
) -> list[tuple[str, str]]:
  """Draws the prompts of `prompts` that have worked solutions, with them.

  Only gsm_symbolic has such solutions. They end in "#### " and the answer, so
  that `score` needs answer_after="####". Those that end in another answer than
  the problem's are left out, and their number is logged; one in 25 writes the
  same number in another form ("3.0"), and stays.

  Args:
    split: see `prompts`, likewise the others.
    seed: see `prompts`.
    num: number of prompts, of which those without a right solution are left
      out.
    generator: see `prompts`.
    template: see `prompts`.
    **config: see `prompts`.

  Returns:
    Pairs (prompt, response), at most `num`.

  Raises:
    ValueError: as `prompts` does, or if the problems have no solutions.
  """
  pairs = []
  asked = prompts(
    split, seed, num=num, generator=generator, template=template, **config
  )
  for prompt in asked:
    _, entry = _drawn[prompt]
    response = entry["metadata"].get("answer_cot")
    if not isinstance(response, str):
      raise ValueError(
        f"The generator {generator!r} has no worked solutions; gsm_symbolic "
        "has."
      )
    if score(prompt, response, answer_after="####")[1]["is_correct"]:
      pairs.append((prompt, response))
  if len(pairs) < len(asked):
    logging.warning(
      "%d of %d solutions of %s contradict their answers and are left out.",
      len(asked) - len(pairs),
      len(asked),
      generator,
    )
  return pairs


def score(
  prompt: str, response: str, *, answer_after: str = ""
) -> tuple[float, dict[str, Any]]:
  """Scores 1 for an answer that the generator's own scorer accepts, else 0.

  Scorers differ in strictness: many accept only the exact text, some "+07.0"
  for 7; number_sorting accepts numbers that are off by one, and gsm_symbolic
  the first number of a text.

  Args:
    prompt: one that `prompts` or `supervised` has drawn in this process.
    response: what the model wrote. More than 10,000 characters are wrong.
    answer_after: "" if the response is the answer, or a marker such as "####":
      the answer follows the last one. Blanks around it do not count.

  Returns:
    1.0 or 0.0, and its parts:
      is_correct: bool, whether the answer is right.
      answer: the truth if and only if the answer is right, however it is
        written, so that right answers vote together; else the text, a number
        without needless zeros. None for no answer, a text where the truth is a
        number, or the truth in a form that the scorer rejects.
      truth: the answer that comes with the problem, written likewise.
      error: why the scorer was not used, or None.

  Raises:
    ValueError: if the prompt was never drawn.
  """
  if prompt not in _drawn:
    raise ValueError(
      "The answer is only known for prompts that `prompts` has drawn in this "
      f"process, got {prompt[:200]!r}."
    )
  dataset, entry = _drawn[prompt]
  truth = _normalized(entry["answer"])
  text, error, is_correct = "", None, False
  if len(response) > MAX_CHARACTERS:
    error = f"The response has more than {MAX_CHARACTERS} characters."
  elif not answer_after:
    text = response.strip()
  elif answer_after in response:
    text = response.rpartition(answer_after)[2].strip()
  if text:
    is_correct, error = _is_right(dataset, entry, text)
  answer = truth
  if not is_correct:
    answer = _normalized(text)
    is_number = _NUMBER.fullmatch(answer) is not None
    if answer == truth or (_NUMBER.fullmatch(truth) and not is_number):
      answer = ""
  return float(is_correct), {
    "is_correct": is_correct,
    "answer": answer or None,
    "truth": truth,
    "error": error,
  }


def character_tokenizer():
  """Makes a tokenizer of characters: 0..94 for " " to "~", then line feed.

  96 starts a prompt (the tokenizer adds it), 97 ends a response, 98 pads.
  Other text raises an error.
  """
  characters = [*map(chr, range(ord(" "), ord("~") + 1)), "\n"]
  return tokenizers.of_words(characters, r"[\s\S]")


# Helpers.


def _draw(
  split: str,
  seed: int,
  num: int,
  generator: str,
  template: str,
  config: dict[str, Any],
) -> dict[str, tuple[Any, dict[str, Any]]]:
  """Draws prompts of a split, each with its data set and its problem."""
  if split not in SPLITS:
    raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
  if num < 0 or seed < 0:
    raise ValueError(f"num and seed must be >= 0, got {num} and {seed}.")
  names = _names_in(template)
  if generator in UNREPEATABLE:
    logging.warning(
      "%s draws other problems in every process, unless PYTHONHASHSEED is set.",
      generator,
    )
  # Problem i is drawn from the seed plus i, so seeds of data sets are far
  # apart. Some generators need 32 bits.
  start = _hash(f"seed {seed} {split}") % (2**32 - 2**24)
  dataset = _create(generator, config, start)
  found: dict[str, tuple[Any, dict[str, Any]]] = {}
  left_out: set[str] = set()
  i = last = 0
  while len(found) < num:
    if i - last == _MAX_REPEATED:
      raise ValueError(
        f"The generator {generator!r} has {len(found)} different {split} "
        f"prompts with these options, and {i - last} more problems had no "
        "other; ask for fewer, or widen its ranges."
      )
    # The size of a data set must not depend on `num`, or its problems may.
    if i and i % _CHUNK == 0:
      dataset = _create(generator, config, start + i)
    entry = dataset[i % _CHUNK]
    prompt = _fill(template, names, entry, generator)
    i += 1
    if _CELLS[_hash(f"split {prompt}") % len(_CELLS)] != split:
      continue
    if prompt in found or prompt in left_out:
      continue
    if _is_answerable(dataset, entry):
      found[prompt] = dataset, entry
      last = i
    else:
      left_out.add(prompt)
  if left_out:
    logging.warning(
      "%d problems of %s are left out: its scorer rejects their answers.",
      len(left_out),
      generator,
    )
  return found


def _create(generator: str, config: dict[str, Any], seed: int):
  """Makes a data set of the package, and checks its options."""
  try:
    import reasoning_gym
    from reasoning_gym import factory
  except ImportError as error:
    raise ValueError(
      "The task reasoning_gym needs the package reasoning-gym: "
      f"pip install reasoning-gym ({error})."
    ) from error
  if generator in REFUSED:
    raise ValueError(
      f"The generator {generator!r} cannot be used: {REFUSED[generator]}."
    )
  if generator not in factory.DATASETS:
    known = sorted(set(factory.DATASETS) - set(REFUSED))
    raise ValueError(
      f"Unknown generator {generator!r}; there are {', '.join(known)}."
    )
  fields = {
    field.name: field
    for field in dataclasses.fields(factory.DATASETS[generator][1])
    if field.name not in ("seed", "size")
  }
  for name in config:
    if name not in fields:
      raise ValueError(
        f"The generator {generator!r} has no option {name!r}; it has "
        f"{', '.join(fields)}."
      )
  config = {k: _as_wanted(v, fields[k]) for k, v in config.items()}
  try:
    return reasoning_gym.create_dataset(
      generator, seed=seed, size=_CHUNK, **config
    )
  except Exception as error:  # They assert, compare texts with numbers, ...
    raise ValueError(
      f"The generator {generator!r} does not accept the options {config}: "
      f"{error or type(error).__name__}."
    ) from error


def _as_wanted(value: Any, field: dataclasses.Field) -> Any:
  """Returns the value of an option, a list of words if it must be a list."""
  default = field.default
  if field.default_factory is not dataclasses.MISSING:
    default = field.default_factory()
  if not isinstance(value, str) or not isinstance(default, list | tuple):
    return value
  kind = type(default[0]) if default else str
  try:
    return type(default)(map(kind, value.split()))
  except ValueError as error:
    raise ValueError(
      f"The option {field.name!r} must be a list such as {default}, got "
      f"{value!r}."
    ) from error


def _names_in(template: str) -> set[str]:
  """Returns the names in curly brackets, checked."""
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError as error:
    raise ValueError(f"template is {template!r}: {error}.") from error
  found = {part[1:] for part in parts if part[1] is not None}
  # Name, format and conversion.
  if not found or not found <= {(name, "", None) for name in _FIELDS}:
    raise ValueError(
      "template must hold {question} or {expression}, and nothing else in "
      f"curly brackets, got {template!r}."
    )
  return {name for name, _, _ in found}


def _fill(
  template: str, names: set[str], entry: dict[str, Any], generator: str
) -> str:
  if not isinstance(entry["answer"], str):
    raise ValueError(
      f"The generator {generator!r} cannot be used: it gives no answers."
    )
  expression = entry["metadata"].get("expression")
  if "expression" in names:
    if not isinstance(expression, str):
      raise ValueError(
        f"The problems of {generator!r} have no expression for the template "
        f"{template!r}; use {{question}}."
      )
    if expression == entry["answer"]:
      raise ValueError(
        f"The expression of {generator!r} is the answer; use {{question}}."
      )
  return template.format(question=entry["question"], expression=expression)


def _is_answerable(dataset: Any, entry: dict[str, Any]) -> bool:
  """Tells whether the scorer accepts the problem's own answer."""
  # Where that is empty (an equation without solutions), any text is right. The
  # scorer of gsm_symbolic misses the sign of a negative number.
  text = entry["answer"].strip()
  return bool(text) and _is_right(dataset, entry, text)[0]


def _remember(prompt: str, dataset: Any, entry: dict[str, Any]) -> None:
  if prompt in _drawn:
    # Some problems come again with another right answer.
    before, other = _drawn[prompt]
    if other["answer"] != entry["answer"] and not (
      _is_right(before, other, entry["answer"])[0]
      and _is_right(dataset, entry, other["answer"])[0]
    ):
      raise ValueError(
        f"The prompt {prompt[:200]!r} has the answers {other['answer']!r} and "
        f"{entry['answer']!r}; a template must tell such problems apart."
      )
    return
  _drawn[prompt] = dataset, entry


def _is_right(
  dataset: Any, entry: dict[str, Any], text: str
) -> tuple[bool, str | None]:
  """Tells whether the package's scorer gives full marks, and why it fails."""
  alphabet = ALPHABETS.get(entry["metadata"]["source_dataset"], r"[\s\S]*")
  if not re.fullmatch(alphabet, text) or any(
    character.isdigit() and not character.isascii() for character in text
  ):
    return False, "The answer has characters that no right answer has."
  if _is_overlooked(entry, text):
    return False, None
  try:
    # Anything may happen to a text that the scorer's authors did not expect.
    return bool(dataset.score_answer(answer=text, entry=entry) == 1.0), None
  except Exception as error:
    return False, f"{type(error).__name__}: {error}"[:200]


def _is_overlooked(entry: dict[str, Any], text: str) -> bool:
  """Tells whether an answer is wrong in a way that its scorer misses."""
  generator = entry["metadata"]["source_dataset"]
  if generator == "gsm_symbolic":
    number = _FIRST_NUMBER.search(text)
    return number is not None and (
      bool(_MINUS.search(text, max(0, number.start() - 20), number.start()))
      != entry["answer"].startswith("-")
    )
  if generator == "word_sorting":  # The right words, and more.
    return text.count(",") != entry["answer"].count(",")
  return False


def _normalized(text: str) -> str:
  text = " ".join(text.split())
  match = _NUMBER.fullmatch(text.replace(",", ""))
  if not match:
    return text
  sign, whole, fraction = match.groups()
  number = f"{whole}.{fraction}" if fraction else whole
  return number if number == "0" else sign + number


def _hash(text: str) -> int:
  digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
  return int.from_bytes(digest, "big")

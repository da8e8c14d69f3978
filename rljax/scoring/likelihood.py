"""How likely a model finds given texts, token by token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rljax.models import hf
from rljax.scoring import cached
from rljax.text import encoding, forms, tokens

LogProbs = list[list[np.ndarray]]  # By row and text, an entry a token.


def of_replies(
  loaded: hf.LanguageModel,
  encoded: encoding.Encoded,
  *,
  batch_size: int,
  mesh: Any,
) -> LogProbs:
  """Computes log-probabilities of the candidates of all rows.

  Args:
    loaded: the model, with its parameters on the mesh.
    encoded: N rows of up to K candidates.
    batch_size: texts at the same time.
    mesh: from `meshes.make`.

  Returns:
    Per row and candidate `[n]` float32, in nats, at temperature 1; the last
    token is the end of the text, unless it was cut.

  Raises:
    ValueError: if prompts and candidates are longer than the model's context.
  """
  tokens.check_positions(
    sum(encoding.lengths(encoded)), loaded.model.config.max_positions
  )
  found = cached.response_log_probs(
    loaded.model, loaded.params, encoded, batch_size=batch_size, mesh=mesh
  )
  return [
    [values[: len(ids)] for ids, values in zip(responses, row, strict=False)]
    for responses, row in zip(encoded.response_ids, found, strict=True)
  ]


def of_texts(
  loaded: hf.LanguageModel,
  rows: Sequence[forms.Row],
  texts: Sequence[Sequence[str]],
  *,
  batch_size: int,
  mesh: Any,
  **settings: Any,
) -> LogProbs:
  """Computes log-probabilities of texts behind the prompts of rows.

  Args:
    loaded: the model, with its parameters on the mesh.
    rows: N rows, of which the prompts count.
    texts: per row, any number of texts; empty ones have no tokens but the end.
    batch_size: texts at the same time.
    mesh: from `meshes.make`.
    **settings: of `encoding.prepare`.

  Returns:
    As `of_replies`; nothing for rows without a text, and for rows that are
    too long, if `too_long` is "skip".

  Raises:
    ValueError: as `encoding.prepare` and `of_replies`.
  """
  found: LogProbs = [[] for _ in rows]
  asked = [
    dataclasses.replace(
      row,
      candidates=tuple(candidates),
      rewards=None,
      response_ids=None,
      place=str(i),
    )
    for i, (row, candidates) in enumerate(zip(rows, texts, strict=True))
    if candidates
  ]
  if asked:
    encoded = encoding.prepare(loaded.tokenizer, asked, **settings)
    log_probs = of_replies(loaded, encoded, batch_size=batch_size, mesh=mesh)
    for row, values in zip(encoded.rows, log_probs, strict=True):
      found[int(row.place)] = values
  return found

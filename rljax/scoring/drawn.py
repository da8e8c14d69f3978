"""Responses that are drawn and scored once, and kept with what they are of."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from rljax.distributed import processes
from rljax.generation import responders, responses
from rljax.models import hf
from rljax.scoring import cached, scorers
from rljax.storage import calls, signals, stages
from rljax.text import encoding, forms, logged


def collect(
  path: str | os.PathLike[str],
  responder: responders.Responder,
  policy: hf.LanguageModel,
  encoded: encoding.Encoded,
  rows: Sequence[forms.Row],
  score: scorers.Scorer,
  *,
  settings: responses.Settings,
  **more: Any,
) -> None:
  """Draws and scores what a file lacks of the responses to all prompts.

  Beside the file stands what it was made of, with the suffix .json; samples of
  another policy, of other prompts, scores or settings are drawn again, and the
  old file is set aside.

  Args:
    path: the file, see `responders.collect`; its folder is made.
    responder: for N prompts, whose texts it holds.
    policy: the model, with its parameters on the mesh.
    encoded: the N prompts as the policy reads them.
    rows: the N prompts as they were given, in any format; see
      `encoding.as_given`.
    score: with the attribute `description`.
    settings: of the sampler.
    **more: what else the responses depend on, as `json` can write it.

  Raises:
    ValueError: as `responders.collect`.
  """
  made_of = cached.describe(
    encoded,
    policy.params,
    policy.tokenizer,
    config=policy.model.config.to_hf(),
    asked=logged.fingerprint(rows),
    score=score.description,
    has_tags=responder.has_forced,
    **cached.precision(policy.model.config.dtype),
    **settings._asdict(),
    **more,
  )
  # Of several processes, one looks, and all wait for it.
  look = functools.partial(stages.set_aside_unless, path, made_of)
  processes.from_first(look)
  shown = responders.Progress(pathlib.Path(path).stem, len(rows))

  def progress(done, batch):
    shown(done, batch)
    calls.check_stop()

  with contextlib.ExitStack() as stack:
    if not calls.CATCHERS and jax.process_count() == 1:
      stack.enter_context(signals.Preemption())
    responders.collect(
      path,
      responder,
      policy.params,
      responder.texts,
      score,
      progress=progress,
    )

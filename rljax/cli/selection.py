"""What selects parameters: the reward of new replies, or a held-out loss."""

from typing import Any

from absl import flags

from rljax.cli import data, rewards, sampling
from rljax.generation import samplers
from rljax.models import hf
from rljax.scoring import scorers


def load_selection(
  values: flags.FlagValues, loaded: hf.LanguageModel, mesh: Any
) -> tuple[scorers.Scorer | None, samplers.Responder | None, list[Any]]:
  """Loads what scores replies, what replies, and the prompts, in a list.

  Where nothing scores, it is None, None and no prompts: the loss on held-out
  rows selects.

  Args:
    values: parsed flags.
    loaded: the policy.
    mesh: from `meshes.make`.

  Raises:
    ValueError: as `load_scorer` and `read_dev`.
  """
  if not data.has_scorer(values):
    return None, None, []
  score = rewards.load_scorer(values, mesh, batch_size=values.sample_batch_size)
  dev = data.read_dev(values, loaded.tokenizer)
  return score, sampling.load_responder(values, loaded, dev, mesh), [dev]


def summary_options(
  values: flags.FlagValues, score: scorers.Scorer | None
) -> dict[str, str]:
  """Returns keyword arguments of `Run.summarise`: what it shows and says."""
  if score is not None:
    return {"prefix": "dev/"}
  return {
    "prefix": "eval/",
    "title": f"{values.workdir}, selected by held-out loss: nothing scores new "
    "replies",
  }

"""What selects parameters: the reward of new replies, or a held-out loss."""

from absl import flags

from rljax.cli import data, rewards, sampling
from rljax.models import hf
from rljax.training import runs, selection


def load_selection(
  values: flags.FlagValues, loaded: hf.LanguageModel, run: runs.Run
) -> selection.Selection:
  """Loads what scores replies, what replies, and the prompts.

  Where nothing scores, the loss on held-out rows selects; the script says which
  by `Selection.by_loss`.

  Args:
    values: parsed flags.
    loaded: the policy.
    run: whose parameters are selected.

  Raises:
    ValueError: as `load_scorer` and `read_dev`.
  """
  if not data.has_scorer(values):
    return selection.Selection(run, batch_size=values.batch_size)
  size = values.sample_batch_size
  score = rewards.load_scorer(values, run.mesh, batch_size=size)
  dev = data.read_dev(values, loaded.tokenizer)
  return selection.Selection(
    run,
    answer=sampling.load_responder(values, loaded, dev, run.mesh),
    score=score,
    dev=[dev],
    batch_size=values.batch_size,
  )

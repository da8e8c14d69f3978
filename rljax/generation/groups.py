"""Groups of responses to one prompt, drawn until enough of them differ."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from rljax.generation import responses
from rljax.ops import masking

Array = chex.Array


def differ(group_scores: Array) -> Array:
  """Tells which groups have something to teach: their scores are not equal.

  Args:
    group_scores: `[B, G]` float, of G responses to each of B prompts; NaN where
      one is left out.

  Returns:
    `[B]` bool.
  """
  library = np if isinstance(group_scores, np.ndarray) else jnp
  is_known = ~library.isnan(group_scores)
  highest = library.where(is_known, group_scores, -np.inf).max(axis=1)
  return highest > library.where(is_known, group_scores, np.inf).min(axis=1)


def deviation(group_scores: Array, counts: Array) -> Array:
  """Averages over groups how far their scores lie from each other.

  Args:
    group_scores: `[B, G]` float.
    counts: `[B, G]` bool, the scores that count.

  Returns:
    The mean standard deviation, over groups with a score that counts.
  """
  mean = masking.masked_mean(group_scores, counts, axis=1)[:, None]
  squares = jnp.square(jnp.where(counts, group_scores - mean, 0.0))
  variance = masking.masked_mean(squares, counts, axis=1)
  return masking.masked_mean(jnp.sqrt(variance), counts.any(axis=1))


class Groups(NamedTuple):
  """What `collect` returns.

  Attributes:
    samples: the groups to learn from, in the order in which they were drawn;
      the rows of a group lie next to each other.
    drawn: all that was drawn, with the groups that were left out.
    num_rounds: batches of prompts that were asked.
    num_useful: groups among all that was drawn whose scores differ.
    num_groups: groups in `samples`.
  """

  samples: responses.Samples
  drawn: responses.Samples
  num_rounds: int
  num_useful: int
  num_groups: int

  def metrics(self) -> dict[str, float]:
    """Describes the groups.

    Returns:
      "groups/rounds"; "groups/acceptance", the share of all groups whose scores
      differ; "groups/without_signal", the share of `samples` whose scores are
      equal; "reward/mean" and "reward/std", over all scores of what was drawn.
    """
    scores = responses.known(self.drawn.scores)
    num_drawn = self.num_rounds * self.num_groups
    return {
      "reward/mean": scores.mean(),
      "reward/std": scores.std(),
      "groups/rounds": self.num_rounds,
      "groups/acceptance": self.num_useful / num_drawn,
      "groups/without_signal": max(0.0, 1 - self.num_useful / self.num_groups),
    }


def collect(
  draw: Callable[[int], responses.Samples],
  num_groups: int,
  *,
  max_rounds: int = 1,
) -> Groups:
  """Draws rounds of groups until there are enough whose scores differ.

  The first `num_groups` such groups are taken. If `max_rounds` rounds have
  fewer, the first of the others fill up.

  Args:
    draw: maps the number of a round to its scored samples, of `num_groups`
      groups of equal size.
    num_groups: B, groups of a round and of the result.
    max_rounds: most rounds; 1 takes the groups of the only one as they are.

  Returns:
    The groups, with their rollouts on the host.

  Source:
    Yu et al. (2025), "DAPO", dynamic sampling.
  """
  rounds, useful, others = [], [], []
  while len(rounds) < max_rounds and len(useful) < num_groups:
    first = len(rounds) * num_groups
    rounds.append(draw(len(rounds)))
    found = differ(rounds[-1].learnt_scores.reshape(num_groups, -1))
    useful += list(first + np.flatnonzero(found))
    others += list(first + np.flatnonzero(~found))
  drawn = responses.Samples.concatenate(rounds)
  chosen = np.sort((useful + others)[:num_groups])
  size = len(drawn.scores) // len(rounds) // num_groups
  rows = chosen[:, None] * size + np.arange(size)
  samples = drawn.take(rows.ravel())
  return Groups(samples, drawn, len(rounds), len(useful), num_groups)

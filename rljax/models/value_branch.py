"""A value branch: layers of a critic of its own on the policy's trunk."""

import dataclasses

import chex
import flax.linen as nn
import jax

from rljax.models import language_models

Array = jax.Array


class ValueBranch(nn.Module):
  """Applies new layers of the policy's family to its last hidden states.

    branch(h) = norm(block_N(... block_1(sg(h))))

  The blocks use the policy's mask and positions, and start with new weights. No
  gradient flows to `hidden`: a critic that learns through the trunk disturbs
  the policy. A `heads.ValueHead` belongs on top.

  Attributes:
    config: of the policy; the branch has its widths and dtypes.
    num_layers: N >= 1.

  Source:
    Havrilla et al. (2024), "Teaching Large Language Models to Reason with
    Reinforcement Learning", who take four layers and detach them. That they
    read the last states, after the last norm, is our choice.
  """

  config: language_models.Config
  num_layers: int

  def setup(self):
    if self.num_layers < 1:
      raise ValueError(f"num_layers must be positive, got {self.num_layers}.")
    config = dataclasses.replace(self.config, num_layers=self.num_layers)
    self.decoder = language_models.module(config)

  def __call__(self, hidden: Array, mask: Array) -> Array:
    """Computes states for a value head.

    Args:
      hidden: `[B, S, D]` float, the policy's last states of whole texts.
      mask: `[B, S]` bool, True at real tokens; padding on either side.

    Returns:
      `[B, S, D]` in the compute dtype. As in the policy, the state of a token
      depends on the tokens up to it.
    """
    chex.assert_rank([hidden, mask], [3, 2])
    chex.assert_equal_shape_prefix([hidden, mask], 2)
    chex.assert_type([hidden, mask], [float, bool])
    return self.decoder.apply_layers(jax.lax.stop_gradient(hidden), mask)

"""Critics: where the values of a text come from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rljax.distributed import planning
from rljax.models import heads, hf, lora, value_branch

Array = jax.Array
Params = Any


class Critic(NamedTuple):
  """Holds a critic: its parameters, value function and sharding rules.

  Attributes:
    params: of the critic alone; a head on the policy's states has few.
    values: `(params, hidden, ids, mask) -> [N, S]` float32, V after every token
      of N texts. `hidden` `[N, S, D]` are the policy's states of them, `ids`
      and `mask` `[N, S]` the texts.
    rules: of `meshes.shardings`, for a tree with the policy and the critic.
    max_positions: the longest text that the critic reads.
  """

  params: Params
  values: Callable[[Params, Array, Array, Array], Array]
  rules: tuple[tuple[str, Any], ...]
  max_positions: int

  def check_positions(self, length: int) -> None:
    """Raises ValueError if the critic cannot read so many tokens."""
    if length > self.max_positions:
      raise ValueError(
        f"The critic reads {self.max_positions} tokens at most, and prompts "
        f"with their responses have up to {length}; shorten --max_length."
      )


def make(
  kind: str,
  loaded: hf.LanguageModel,
  seed: int,
  mesh: jax.sharding.Mesh,
  **model_options: Any,
) -> Critic:
  """Makes a critic for a policy.

  Args:
    kind: "shared", a linear head on the policy's states; "detached", the same
      without a gradient into the policy; "branch:N", N layers of its own on the
      policy's states, likewise without a gradient; "separate", a copy of the
      policy with a head; or anything that `hf.load` takes, with the policy's
      vocabulary.
    loaded: the policy.
    seed: of new weights.
    mesh: from `meshes.make`.
    **model_options: of `hf.load`.

  Returns:
    The critic, whose values start at 0.

  Raises:
    ValueError: if there is no such critic or model, or it has other tokens.
  """
  head = heads.ValueHead()
  num_layers = branch_layers(kind)
  config = loaded.model.config
  model, params = loaded.model, {}
  if num_layers:
    branch = value_branch.ValueBranch(config, num_layers)
    params["branch"] = planning.initialise(
      branch.init,
      jax.random.key(seed),
      jnp.zeros((1, 1, config.hidden_size)),
      jnp.ones((1, 1), bool),
    )["params"]
    features = lambda params, hidden, ids, mask: branch.apply(
      {"params": params["branch"]}, hidden, mask
    )
  elif kind == "shared":
    features = lambda params, hidden, ids, mask: hidden
  elif kind == "detached":
    features = lambda params, hidden, ids, mask: jax.lax.stop_gradient(hidden)
  else:
    params["model"] = loaded.params
    is_copy = kind == "separate"
    # All weights of a critic learn: it is no copy of a policy with adapters.
    if not is_copy or isinstance(model, lora.Model):
      other = hf.load(loaded.source if is_copy else kind, **model_options)
      model, params["model"] = other.model, other.params
      if model.config.vocab_size != config.vocab_size:
        raise ValueError(
          f"--critic={kind} has {model.config.vocab_size} tokens, the policy "
          f"{config.vocab_size}: they must share a tokenizer."
        )
    features = lambda params, hidden, ids, mask: model.apply(
      {"params": params["model"]}, ids, mask
    )
  params["head"] = head.init(
    jax.random.key(seed), jnp.zeros((1, model.config.hidden_size))
  )["params"]

  def values(params, hidden, ids, mask):
    states = features(params, hidden, ids, mask)
    return head.apply({"params": params["head"]}, states)

  # A critic may be of another family; the last rule catches all the rest.
  rules = (
    *hf.partition_rules(loaded.model, mesh)[:-1],
    *hf.partition_rules(model, mesh),
  )
  return Critic(params, values, rules, model.config.max_positions)


def branch_layers(kind: str) -> int:
  """Returns N of "branch:N", and 0 for other critics.

  Raises:
    ValueError: if N is missing or not a positive number.
  """
  name, _, number = kind.partition(":")
  if name != "branch":
    return 0
  if not (number.isdecimal() and int(number)):
    raise ValueError(
      f"--critic=branch needs a number of layers, such as branch:4, got {kind}."
    )
  return int(number)

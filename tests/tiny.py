"""Models of a few thousand parameters, and tensors for them."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rljax.models import decoder, gpt2, llama

GOLDEN = pathlib.Path(__file__).parent / "golden"


def gpt2_config(**fields) -> gpt2.GPT2Config:
  """Two layers, width 16, 4 heads, 40 tokens, 64 positions."""
  sizes = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "max_positions": 64,
  }
  return gpt2.GPT2Config(**(sizes | fields))


def llama_config(**fields) -> llama.LlamaConfig:
  """Two layers, width 16, 4 heads on 2 key heads, 40 tokens."""
  sizes = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "max_positions": 64,
    "num_kv_heads": 2,
  }
  return llama.LlamaConfig(**(sizes | fields))


def model(config):
  """The module of a config of either family."""
  if isinstance(config, gpt2.GPT2Config):
    return gpt2.GPT2(config)
  return llama.Llama(config)


def family(config):
  """The module of functions and classes that a config belongs to."""
  return gpt2 if isinstance(config, gpt2.GPT2Config) else decoder


def parameter_names(config):
  """The table of tensor names of a config of either family."""
  return family(config).parameter_names(config)


def shapes(config) -> dict:
  """The shapes and dtypes of a model's parameters, nothing computed."""
  ids = jnp.zeros((1, 2), jnp.int32)
  init = model(config).init
  return jax.eval_shape(init, jax.random.key(0), ids, ids == 0)["params"]


def params(config, seed: int = 0) -> dict:
  """Random parameters, large enough that every part of a model matters.

  Scales of norms lie around 1; all else, biases included, around 0.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape)
    is_scale = path[-1].key == "scale"
    return jnp.asarray(1 + 0.3 * noise if is_scale else 0.4 * noise, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes(config))


def params_from_tensors(config, tensors) -> dict:
  """Hugging Face tensors, by name, as the parameters of a model."""
  params = {}
  for name, (path, transpose) in parameter_names(config).items():
    place = params
    for key in path[:-1]:
      place = place.setdefault(key, {})
    tensor = tensors[name]
    place[path[-1]] = jnp.asarray(tensor.T if transpose else tensor)
  return params


def golden(name: str) -> dict:
  """A file that `golden/write_models.py` wrote.

  Returns:
    Its arrays; `config` as a dict; `weights` and `gradients` as dicts by
    tensor name.
  """
  content = {"weights": {}, "gradients": {}}
  with np.load(GOLDEN / f"{name}.npz") as file:
    for key in file:
      kind, _, tensor = key.partition("/")
      if tensor:
        content[kind + "s"][tensor] = file[key]
      else:
        content[key] = file[key]
  content["config"] = json.loads(str(content["config"]))
  return content


def batch(seed: int = 0, shape=(4, 12), vocab_size: int = 40):
  """Random ids, and a mask with no, left, right and both-sided padding."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, vocab_size, size=shape)
  mask = np.ones(shape, bool)
  length = shape[1]
  mask[1::4, : length // 3] = False
  mask[2::4, length - length // 4 :] = False
  mask[3::4, : length // 4] = False
  mask[3::4, length - length // 3 :] = False
  return jnp.asarray(ids, jnp.int32), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(model, params, ids, mask):
  """Mean -log p of the tokens whose predecessor is real too."""

  def mean_nll(params):
    variables = {"params": params}
    hidden = model.apply(variables, ids, mask)
    logits = model.apply(variables, hidden, method="logits")[:, :-1]
    log_probs = jnp.take_along_axis(
      jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1
    )[..., 0]
    counts = mask[:, 1:] & mask[:, :-1]
    total = jnp.sum(jnp.where(counts, log_probs, 0))
    return -total / jnp.sum(counts, dtype=jnp.float32)

  return jax.value_and_grad(mean_nll)(params)


def tensor(config, params, name: str) -> np.ndarray:
  """One parameter in Hugging Face's orientation."""
  path, transpose = parameter_names(config)[name]
  for key in path:
    params = params[key]
  return np.asarray(params.T if transpose else params)

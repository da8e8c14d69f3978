"""What tests of samplers draw with: a tiny model and its tokenizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.distributed import meshes
from rljax.generation import responders, responses, rollouts, samplers
from rljax.ops import sampling
from rljax.tasks import arithmetic, word_lists
from rljax.text import prompts, tokens
from tests import tiny

pytest.importorskip("tokenizers")

WORDS = word_lists.word_tokenizer()
NUMBERS = arithmetic.word_tokenizer()  # Its tokens are joined without blanks.
PROMPTS = (
  "birds 4 not duck owl:",
  "fish 2 not cod eel:",
  "birds 5 not duck owl:",
  "birds 4 not dove owl:",
  "birds",
  "trees 3 not ash elm:",
  "metals 6 not iron lead: iron",
)
MAX_LENGTH = 6
MODEL = tiny.model(tiny.llama_config(vocab_size=120, num_layers=1))
SAMPLED, GREEDY = sampling.Settings(), sampling.Settings(greedy=True)


@functools.cache
def params(seed=0):
  return tiny.params(MODEL.config, seed)


def responder(prompts=PROMPTS, tokenizer=WORDS, model=MODEL, **options):
  options = {
    "max_length": MAX_LENGTH,
    "settings": GREEDY,
    "batch_size": 8,
    "mesh": meshes.make("data:1"),
    **options,
  }
  ids = tokens.encode_prompts(tokenizer, prompts, max_length=99)
  return responders.Responder(model, tokenizer, ids, **options)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, ids, mask):
  hidden = model.apply({"params": params}, ids, mask)
  return model.apply({"params": params}, hidden, method="logits")


@functools.cache
def greedily(seed, prompt):
  """The likeliest words one by one, without pads, caches or batches."""
  ids = WORDS.encode(prompt)
  start = len(ids)
  banned = {WORDS.bos_token_id, WORDS.pad_token_id, *range(len(WORDS), 120)}
  allowed = [i for i in range(120) if i not in banned]
  for _ in range(MAX_LENGTH):
    padded = jnp.zeros((1, 16), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
    mask = jnp.arange(16)[None] < len(ids)
    logits = np.asarray(_logits(MODEL, params(seed), padded, mask))
    ids.append(max(allowed, key=logits[0, len(ids) - 1].__getitem__))
    if ids[-1] == WORDS.eos_token_id:
      break
  return WORDS.decode(ids[start:], skip_special_tokens=True)


def encoded(texts=PROMPTS, tokenizer=WORDS):
  return prompts.encode(tokenizer, texts, max_length=99)[0]


def sampler(spec="data:1", tokenizer=WORDS, model=MODEL, task=None, **options):
  settings = responses.Settings(**{"max_length": MAX_LENGTH, **options})
  return samplers.Sampler(
    model, tokenizer, settings, mesh=meshes.make(spec), task=task
  )


def rollout(model, params, *, num_samples=2, max_length=4, **options):
  """Responses to three prompts of different lengths."""
  rng = np.random.default_rng(0)
  lengths = np.array([1, 3, 2])
  mask = jnp.asarray(np.arange(3)[None] >= 3 - lengths[:, None])
  vocab = model.config.vocab_size
  ids = jnp.asarray(rng.integers(0, vocab, (3, 3)), jnp.int32)
  return rollouts.sample(
    jax.random.key(0),
    model,
    params,
    ids,
    mask,
    max_length=max_length,
    settings=options.pop("settings", sampling.Settings()),
    num_samples=num_samples,
    **options,
  )

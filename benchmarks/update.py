"""One PPO update beside a plain torch loop of the same arithmetic.

  python -m benchmarks.update --models=tiny,smollm2-135m

Forward, clipped policy and value loss, backward and Adam, on the same weights
and tokens, in float32; torch once more with bfloat16 autocast. The sides take
turns, and the ratio is the median over pairs. The share of the peak counts
6 FLOPs per parameter and token.
"""

import functools
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import generation, machine
from rljax.generation import rollouts
from rljax.losses import ppo

flags.DEFINE_integer("rows", 16, "Responses in the update.")
flags.DEFINE_integer("response_tokens", 48, "Length of the responses.")
FLAGS = flags.FLAGS

LEARNING_RATE = 1e-5


def main(_):
  machine.report("update", {"": "One PPO update"}, measure_all)


def measure_all():
  peak = machine.matmul_peak()
  print(
    f"jax {jax.__version__} on {jax.devices()[0].device_kind}: "
    f"{peak / 1e9:.0f} GFLOP/s float32 matmul"
  )
  rows = []
  for name in FLAGS.models:
    model, params = generation.load(name)
    size = sum(x.size for x in jax.tree.leaves(params))
    peers = generation.load_peers(model, params)
    batch = make_batch(model)
    ours = rljax_update(model, params, batch)
    theirs = {
      label: torch_update(peers["float32"], batch, autocast=autocast)
      for label, autocast in (("float32", False), ("autocast", True))
      if peers
    }
    losses = {"rljax": ours(), **{key: run() for key, run in theirs.items()}}
    times = {key: [] for key in losses}
    for _ in range(FLAGS.repeats):
      times["rljax"] += generation.timed(ours)
      for key, run in theirs.items():
        times[key] += generation.timed(run)
    median = statistics.median(times["rljax"])
    tokens = FLAGS.rows * (FLAGS.prompt_tokens + FLAGS.response_tokens - 1)
    row = {"model": name, "rljax s": median}
    for key in theirs:
      row[f"torch {key} s"] = statistics.median(times[key])
      row[f"speed-up over {key}"] = machine.median_ratio(
        times[key], times["rljax"]
      )
    row["share of matmul peak"] = 6 * size * tokens / median / peak
    row["first losses"] = " ".join(f"{x:.4f}" for x in losses.values())
    rows.append(row)
    print(json.dumps(row), flush=True)
  return rows


def make_batch(model):
  rng = np.random.default_rng(0)
  vocab = model.config.vocab_size
  prompts = (FLAGS.rows, FLAGS.prompt_tokens)
  responses = (FLAGS.rows, FLAGS.response_tokens)
  normal = lambda: rng.normal(size=responses).astype(np.float32)
  return {
    "prompt_ids": rng.integers(3, vocab, prompts).astype(np.int32),
    "prompt_mask": np.ones(prompts, bool),
    "response_ids": rng.integers(3, vocab, responses).astype(np.int32),
    "response_mask": np.ones(responses, bool),
    "old_log_probs": normal() - np.log(vocab).astype(np.float32),
    "old_values": normal(),
    "advantages": normal(),
    "returns": normal(),
  }


def rljax_update(model, params, batch):
  params = {
    "policy": params,
    "value_head": jnp.zeros(model.config.hidden_size),
  }
  optimizer = optax.adam(LEARNING_RATE)

  def loss_fn(params, batch):
    statistics_, hidden = rollouts.token_statistics(
      model, params["policy"], batch, temperature=1.0
    )
    mask = batch["response_mask"]
    policy_loss, _ = ppo.clipped_policy_loss(
      statistics_.log_probs,
      batch["old_log_probs"],
      batch["advantages"],
      mask,
      clip_epsilon=0.2,
    )
    value_loss, _ = ppo.clipped_value_loss(
      hidden.astype(jnp.float32) @ params["value_head"],
      batch["old_values"],
      batch["returns"],
      mask,
      clip_epsilon=0.2,
    )
    return policy_loss + 0.1 * value_loss

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state[0], batch)
    updates, optimizer_state = optimizer.update(grads, state[1])
    return (optax.apply_updates(state[0], updates), optimizer_state), loss

  copy = jax.tree.map(jnp.copy, params)
  box = [(copy, optimizer.init(copy))]
  batch = jax.device_put(batch)

  def run():
    box[0], loss = update(box[0], batch)
    jax.block_until_ready(box[0])
    return float(loss)

  return run


def torch_update(model, batch, *, autocast):
  import copy

  import torch

  model = copy.deepcopy(model).train()
  for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
      module.p = 0.0
  head = torch.zeros(model.config.hidden_size, requires_grad=True)
  optimizer = torch.optim.Adam([*model.parameters(), head], lr=LEARNING_RATE)
  tensors = {name: torch.tensor(value) for name, value in batch.items()}
  start = FLAGS.prompt_tokens - 1
  ids = torch.cat([tensors["prompt_ids"], tensors["response_ids"]], 1).long()

  def run():
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
      out = model(ids[:, :-1], output_hidden_states=True)
    logits = out.logits[:, start:].float()
    log_probs = torch.log_softmax(logits, -1)
    log_probs = log_probs.gather(-1, ids[:, start + 1 :, None])[..., 0]
    ratio = torch.exp(log_probs - tensors["old_log_probs"])
    advantages = tensors["advantages"]
    policy_loss = torch.maximum(
      -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    ).mean()
    values = out.hidden_states[-1][:, start:].float() @ head
    clipped = tensors["old_values"] + (values - tensors["old_values"]).clamp(
      -0.2, 0.2
    )
    value_loss = (
      0.5
      * torch.maximum(
        (values - tensors["returns"]) ** 2, (clipped - tensors["returns"]) ** 2
      ).mean()
    )
    loss = policy_loss + 0.1 * value_loss
    loss.backward()
    optimizer.step()
    return loss.item()

  return run


if __name__ == "__main__":
  app.run(main)

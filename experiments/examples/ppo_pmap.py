"""PPO with `jax.pmap`: sampling, GAE and the update on every local device.

The main path (`experiments/ppo.py`) is `jax.jit` over a mesh, where arrays are
whole and the compiler splits them. This is the other classic form: each device
holds a copy of the parameters and its own rows, and the code says what crosses
devices. Two rules make it equal to the whole batch, and every function of
rljax with an `axis_name` keeps the first:

  1. sums cross devices before anything nonlinear (a mean, a standard
     deviation, an entropy, a clip) is taken of them;
  2. the gradients of a loss made so are averaged with `pmean`.

A few minutes on two CPU cores that stand in for eight devices, after
experiments/sft.py has made the policy:

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python experiments/examples/ppo_pmap.py --policy=runs/sft \
    --task=arithmetic --task_options=style=last --workdir=runs/pmap

With the same flags it ends with the parameters of ppo.py, to rounding. It runs
in one process, evaluates nothing, saves once, at the end, and cannot go on with
a run that was stopped.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging

from rljax import cli, tasks
from rljax.distributed import processes
from rljax.evaluation import answers
from rljax.generation import rollouts
from rljax.losses import entropy, ppo
from rljax.models import heads, hf
from rljax.ops import advantages, masking, rewards, sampling
from rljax.storage import checkpoint, locks, workdirs
from rljax.text import (
  batches,
  keywords,
  prompts,
  tokens,
  vocabularies,
)
from rljax.training import guards, logs, optimizers

flags.DEFINE_string(
  "workdir",
  None,
  "Folder for the metrics and, at the end, the parameters; without a run.",
  required=True,
)
flags.DEFINE_string(
  "policy",
  None,
  "Language model that the policy starts as: the workdir of a run, a Hugging "
  "Face directory or a hub name.",
  required=True,
)
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.", 0)
flags.DEFINE_integer("steps", 100, "Rollouts, each followed by --epochs.", 1)
flags.DEFINE_string(
  "task",
  "",
  "Task that writes prompts and scores responses: one of rljax.tasks; or one "
  "of your own, by its path, such as ./my_task.py, or its module, such as "
  "my_package.my_task.",
)
flags.DEFINE_list(
  "task_options",
  [],
  "Options of the task's prompts, name=value, separated by commas; "
  "docs/tasks.md lists them.",
)
flags.DEFINE_integer(
  "num_prompts", 32_768, "Training prompts that the task draws.", 1
)
flags.DEFINE_integer(
  "batch_size", 128, "Prompts of a step, which all devices share evenly.", 1
)
flags.DEFINE_integer("max_length", 1, "Tokens of a response.", 1)
flags.DEFINE_float(
  "temperature",
  1.0,
  "Temperature τ of sampler and trainer, which divides the logits; above 0.",
  1e-6,
)
flags.DEFINE_float("discount", 1.0, "Discount γ of a response token.", 0, 1)
flags.DEFINE_float(
  "gae_lambda",
  0.95,
  "λ of GAE in [0, 1]; 1 gives Monte Carlo returns, 0 one-step TD.",
  0,
  1,
)
flags.DEFINE_float(
  "clip_epsilon",
  0.2,
  "How far a probability ratio may move from 1, and a value from the old one; "
  "above 0.",
  1e-9,
)
flags.DEFINE_float("value_coef", 0.1, "Weight of the value loss.", 0)
flags.DEFINE_float(
  "batch_entropy_coef",
  0.3,
  "Weight of the batch entropy bonus, which this example has by default.",
)
flags.DEFINE_float(
  "ratio_guard", 10.0, "Mean ratio above which an update is skipped; above 0."
)
flags.DEFINE_integer("epochs", 4, "Updates on a rollout, each on all of it.", 1)
flags.DEFINE_float("learning_rate", 3e-4, "Learning rate of Adam.", 0)
cli.define_max_skipped()
cli.require(
  ["task"],
  lambda v: v["task"],
  "There is nothing to ask the policy: give --task, such as "
  "--task=arithmetic --task_options=style=last; ppo.py reads --data as well.",
)
FLAGS = flags.FLAGS

AXIS = "devices"


def main():
  logging.set_verbosity(logging.WARNING)  # Orbax has much to say.
  processes.check_joined()
  devices = jax.local_devices()
  if FLAGS.batch_size % len(devices):
    raise ValueError(
      f"--batch_size must be divisible by the {len(devices)} devices, got "
      f"{FLAGS.batch_size}."
    )
  workdirs.prepare(FLAGS.workdir)
  lock = locks.take(FLAGS.workdir)
  if checkpoint.holds_run(FLAGS.workdir):
    raise ValueError(
      f"--workdir={FLAGS.workdir} holds a run, and this example does not "
      "resume; choose another."
    )
  task = tasks.load(FLAGS.task)
  loaded = hf.load(FLAGS.policy)
  policy, tokenizer = loaded.model, loaded.tokenizer
  allowed = jnp.asarray(
    vocabularies.allowed_tokens(tokenizer, policy.config.vocab_size)
  )
  task_options = keywords.parse(FLAGS.task_options)
  keywords.check(task.prompts, task_options)
  texts = task.prompts(
    "train", FLAGS.seed, num=FLAGS.num_prompts, **task_options
  )
  (train,) = prompts.encode(tokenizer, texts, max_length=512)
  tokens.check_positions(
    train.ids.shape[1] + FLAGS.max_length, policy.config.max_positions
  )

  # The state is the same on every device; `replicate` adds a leading axis.
  # The names are those of ppo.py with --critic=shared.
  head = heads.ValueHead()
  head_params = head.init(
    jax.random.key(FLAGS.seed), jnp.zeros((1, policy.config.hidden_size))
  )["params"]
  params = {"policy": loaded.params, "critic": {"head": head_params}}
  optimizer = optimizers.guarded(optax.adam(FLAGS.learning_rate))
  replicate = lambda tree: jax.tree.map(
    lambda x: jnp.broadcast_to(x, (len(devices), *jnp.shape(x))), tree
  )
  params, optimizer_state = replicate((params, optimizer.init(params)))

  def forward(params, rollout):
    statistics, hidden = rollouts.token_statistics(
      policy,
      params["policy"],
      rollout,
      temperature=FLAGS.temperature,
      allowed=allowed,
    )
    values = head.apply({"params": params["critic"]["head"]}, hidden)
    return statistics, hidden, values

  # Devices share the key of the step: a sample's own key is made of that and
  # of the index of its prompt in the whole batch.
  @functools.partial(jax.pmap, axis_name=AXIS, in_axes=(None, 0, 0, 0, 0))
  def sample(key, params, ids, mask, prompt_indices):
    return rollouts.sample(
      key,
      policy,
      params["policy"],
      ids,
      mask,
      max_length=FLAGS.max_length,
      settings=sampling.Settings(temperature=FLAGS.temperature),
      prompt_indices=prompt_indices,
      allowed=allowed,
    )

  @functools.partial(jax.pmap, axis_name=AXIS)
  def prepare(params, rollout, scores):
    mask = rollout.response_mask
    old, _, old_values = forward(params, rollout)
    token_advantages, returns = advantages.gae(
      rewards.place_score(scores, mask),
      old_values,
      mask,
      discount=FLAGS.discount,
      gae_lambda=FLAGS.gae_lambda,
    )
    return jax.lax.stop_gradient(
      {
        "rollout": rollout,
        "old_log_probs": old.log_probs,
        "old_values": old_values,
        "advantages": masking.masked_whiten(
          token_advantages, mask, axis_name=AXIS
        ),
        "returns": returns,
      }
    )

  def loss_fn(params, batch):
    mask = batch["rollout"].response_mask
    statistics, hidden, values = forward(params, batch["rollout"])
    policy_loss, metrics = ppo.clipped_policy_loss(
      statistics.log_probs,
      batch["old_log_probs"],
      batch["advantages"],
      mask,
      clip_epsilon=FLAGS.clip_epsilon,
      axis_name=AXIS,
    )
    value_loss, value_metrics = ppo.clipped_value_loss(
      values,
      batch["old_values"],
      batch["returns"],
      mask,
      clip_epsilon=FLAGS.clip_epsilon,
      axis_name=AXIS,
    )
    # The entropy of the mean over all devices, not the mean of entropies.
    batch_entropy, entropies = entropy.batch_entropy(
      policy.apply({"params": params["policy"]}, hidden, method="logits"),
      mask,
      allowed=allowed,
      temperature=FLAGS.temperature,
      axis_name=AXIS,
    )
    loss = (
      policy_loss
      + FLAGS.value_coef * value_loss
      - FLAGS.batch_entropy_coef * batch_entropy
    )
    loss *= ppo.ratio_guard(
      statistics.log_probs,
      batch["old_log_probs"],
      mask,
      threshold=FLAGS.ratio_guard,
      axis_name=AXIS,
    )
    return loss, {"loss": loss, **metrics, **value_metrics, **entropies}

  @functools.partial(jax.pmap, axis_name=AXIS, donate_argnums=(0, 1))
  def update(params, optimizer_state, batch):
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params, batch)
    grads = jax.lax.pmean(grads, AXIS)
    return optimizers.step(optimizer, grads, optimizer_state, params, metrics)

  split = lambda x: x.reshape(len(devices), -1, *x.shape[1:])
  join = lambda x: np.asarray(x).reshape(-1, *x.shape[2:])
  hf.save_config(os.path.join(FLAGS.workdir, "model"), policy, tokenizer)
  columns = ("reward/mean", "task/is_correct", "entropy/batch")
  with logs.Logs(
    FLAGS.workdir, total_steps=FLAGS.steps, columns=columns
  ) as log:
    watch = guards.Watch(log.note, max_skipped=FLAGS.max_skipped)
    for step in range(FLAGS.steps):
      rows = batches.batch_indices(
        len(train), FLAGS.batch_size, step, seed=FLAGS.seed
      )
      # The same keys as in ppo.py; its second one shuffles minibatches.
      key = jax.random.fold_in(jax.random.key(FLAGS.seed), step)
      rollout = sample(
        jax.random.split(key)[0],
        params,
        split(train.ids[rows]),
        split(train.mask[rows]),
        split(np.arange(FLAGS.batch_size)),
      )
      responses = tokens.decode(
        tokenizer, join(rollout.response_ids), join(rollout.response_mask)
      )
      scores, parts = tasks.score_all(
        task, [train.texts[i] for i in rows], responses
      )
      batch = prepare(params, rollout, split(scores))
      for _ in range(FLAGS.epochs):
        params, optimizer_state, metrics = update(
          params, optimizer_state, batch
        )
      # The metrics are those of the whole batch on every device.
      metrics = {name: value[0] for name, value in metrics.items()}
      metrics |= answers.mean_parts(parts, prefix="task/")
      log.write(step, metrics | {"reward/mean": scores.mean()})
      watch.look(step, metrics)
  state = {"params": jax.tree.map(lambda x: x[0], params)}
  with checkpoint.Checkpoints(FLAGS.workdir) as checkpoints:
    checkpoints.save(FLAGS.steps, state, {"step": FLAGS.steps})
  lock.close()


if __name__ == "__main__":
  cli.run(main)

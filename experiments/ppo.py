"""PPO on a language model with programmed or learnt rewards.

A minute on two CPU cores, after experiments/sft.py has made the policy:

  python experiments/ppo.py \
    --flagfile=experiments/flags/padula/arithmetic_cpu.flags \
    --policy=runs/sft --workdir=runs/ppo --batch_entropy_coef=0.3

One step samples responses, scores them, turns the scores into token rewards
and advantages, and takes several epochs of clipped updates. To try an idea,
copy this file and change `prepare` (what is learnt from) or `loss_fn` (how).

Source: Padula and Soemers (2024), arXiv 2410.17126. Departures: sampler and
loss share one mask of allowed tokens (--mask_in_loss), the KL modes have
names, and the ratio guard zeroes the entropy terms too. The critic that is a
branch and the reward terms follow Havrilla et al. (2024), arXiv 2403.04642;
docs/reasoning.md has the flags of their rows.
"""

import functools
import time

import jax
from absl import flags

from rljax import cli
from rljax.distributed import meshes
from rljax.evaluation import answers
from rljax.generation import rollouts, samplers
from rljax.losses import entropy, ppo
from rljax.models import critics
from rljax.ops import advantages, masking, rewards
from rljax.text import prompts
from rljax.training import microbatch, optimizers, preflight, runs

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_run(steps=1024, save_every=200, eval_every=100, samples_every=50)
cli.define_task(num_prompts=131_072, num_eval_prompts=512)
cli.define_models()
cli.define_sampler(max_length=256, num_samples=1, online=True)
cli.define_reward_terms()
cli.define_prompts("reward_model")
cli.define_kl(
  "none",
  ["none", "initial", "old"],
  "KL penalty: initial, on the rewards, to --reference; old, in the loss, to "
  "the policy that sampled.",
  kl_coef=0.2,
)
cli.define_adaptive_kl()
cli.define_batches(
  128, epochs=4, text="Prompts of each step.", minibatches=True
)
cli.define_optimizer(1e-6, warmup=0.03, max_grad_norm=1.0)

# Flags of PPO.
flags.DEFINE_string(
  "critic",
  "shared",
  "Where values come from: shared (a linear head on the policy), detached (the "
  "same without a gradient into the policy), separate (a copy of the policy), "
  "branch:N (N layers on the policy's states), or a model's name.",
)
flags.DEFINE_float("discount", 1.0, "Discount γ of a response token.", 0, 1)
flags.DEFINE_float(
  "gae_lambda",
  0.95,
  "λ of GAE in [0, 1]; 1 gives Monte Carlo returns, 0 one-step TD.",
  0,
  1,
)
flags.DEFINE_bool(
  "whiten_advantages",
  True,
  "Whether advantages get mean 0 and variance 1 over the tokens of a step.",
)
flags.DEFINE_float(
  "clip_epsilon", 0.2, "How far the probability ratio may move from 1.", 0
)
flags.DEFINE_float(
  "value_clip_epsilon", 0.2, "How far a value may move, in units of return.", 0
)
flags.DEFINE_float("value_coef", 0.1, "Weight of the value loss.", 0)
flags.DEFINE_float("entropy_coef", 0.0, "Weight of the token entropy bonus.")
flags.DEFINE_float(
  "batch_entropy_coef", 0.0, "Weight of the batch entropy bonus."
)
flags.DEFINE_enum(
  "batch_entropy_mode",
  "per_step",
  ["last", "per_step", "pooled", "mi"],
  "Which tokens the batch entropy compares; see losses/entropy.py.",
)
flags.DEFINE_bool(
  "mask_in_loss",
  True,
  "Whether the loss renormalises over the tokens that the sampler may draw; "
  "false reproduces the paper's code.",
)
flags.DEFINE_float(
  "ratio_guard",
  10.0,
  "Mean ratio above which an update is skipped; 0: none.",
  0,
)
FLAGS = flags.FLAGS

COLUMNS = (
  *("reward/mean", "task/is_correct", "entropy/token", "entropy/batch"),
  *("ppo/approx_kl", "tokens_per_second"),
)


def main():
  run = runs.start(FLAGS, total_steps=FLAGS.steps)
  sizes = cli.batch_sizes(FLAGS, run.mesh, num_samples=FLAGS.num_samples)
  check_flags()

  # Models: the policy, its critic, and the policy of the KL penalty.
  options = cli.model_options(FLAGS)
  loaded = cli.load_policy(FLAGS)
  policy, tokenizer = loaded.model, loaded.tokenizer
  critic = critics.make(FLAGS.critic, loaded, FLAGS.seed, run.mesh, **options)
  reference = None
  if FLAGS.kl == "initial":
    reference = cli.load_reference(FLAGS, loaded).params

  # Reads all rows of a step in no more memory than an update takes.
  apart = {"sharding": run.rows_sharding, "buckets": sizes.buckets}
  in_parts = functools.partial(
    microbatch.map_rows, num_parts=sizes.num_passes, **apart
  )

  # Text: prompts, what scores responses, and what writes them.
  task = cli.load_task(FLAGS)
  train, held_out = prompts.load(task, tokenizer, **cli.prompt_options(FLAGS))
  score = cli.task_scorer(FLAGS, task, run.mesh)
  terms = cli.load_reward_terms(
    FLAGS, loaded, run.mesh, score, map_rows=in_parts
  )
  terms.check(score, held_out.texts[0])
  sampler = samplers.Sampler(
    policy, tokenizer, cli.sampler_settings(FLAGS), mesh=run.mesh, task=task
  )
  answer = sampler.greedy(held_out, batch_size=FLAGS.batch_size)
  critic.check_positions(train.ids.shape[1] + FLAGS.max_length)

  # What is differentiated.
  statistics_of = functools.partial(
    rollouts.token_statistics,
    policy,
    temperature=FLAGS.temperature,
    allowed=sampler.allowed if FLAGS.mask_in_loss else None,
    chunk_size=FLAGS.chunk_size,
  )

  def read(params, rollout):
    """Token statistics of all rows, without gradients."""
    return in_parts(lambda part: statistics_of(params, part)[0], rollout)

  def forward(params, rollout):
    """Token statistics, hidden states and values, `[N, T, ...]` each."""
    ids, mask = rollouts.text(rollout)
    states = policy.apply({"params": params["policy"]}, ids, mask)
    hidden = rollouts.at_responses(states, rollout)
    statistics, _ = statistics_of(params["policy"], rollout, hidden=hidden)
    values = critic.values(params["critic"], states, ids, mask)
    return statistics, hidden, rollouts.at_responses(values, rollout)

  def batch_entropy(params, hidden, mask):
    return entropy.batch_entropy_from_hidden(
      lambda h: policy.apply({"params": params["policy"]}, h, method="logits"),
      hidden,
      mask,
      # Of all rows at a time, or of those of a micro-batch.
      chunk_size=FLAGS.chunk_size
      or rollouts.num_columns(policy, hidden.shape[0]),
      mode=FLAGS.batch_entropy_mode,
      temperature=FLAGS.temperature,
      allowed=sampler.allowed,
      mask_in_loss=FLAGS.mask_in_loss,
    )

  def loss_fn(params, batch, kl_coef):
    rollout = batch["rollout"]
    mask, old = rollout.response_mask, batch["old_log_probs"]
    statistics, hidden, values = forward(params, rollout)
    new = statistics.log_probs
    policy_loss, metrics = ppo.clipped_policy_loss(
      new,
      old,
      batch["advantages"],
      mask,
      clip_epsilon=FLAGS.clip_epsilon,
    )
    value_loss, value_metrics = ppo.clipped_value_loss(
      values,
      batch["old_values"],
      batch["returns"],
      mask,
      clip_epsilon=FLAGS.value_clip_epsilon,
    )
    loss = policy_loss + FLAGS.value_coef * value_loss
    if FLAGS.entropy_coef:
      token_entropy = masking.masked_mean(statistics.entropies, mask)
      loss -= FLAGS.entropy_coef * token_entropy
    if FLAGS.batch_entropy_coef:
      spread, _ = batch_entropy(params, hidden, mask)
      loss -= FLAGS.batch_entropy_coef * spread
    if FLAGS.kl == "old":
      loss += kl_coef * ppo.kl_from_old(new, old, mask)
    if FLAGS.ratio_guard:
      loss *= ppo.ratio_guard(new, old, mask, threshold=FLAGS.ratio_guard)
    return loss, {"loss": loss, **metrics, **value_metrics}

  # Means are over tokens: a micro-batch weighs by its share of them. The ratio
  # guard and the batch entropy are no sums over rows, and stay its own: the
  # entropy is low by about (K - 1) / 2b for K answers and b rows.
  gradients = functools.partial(
    microbatch.grad,
    loss_fn,
    weigh=lambda part: part["rollout"].response_mask.sum(),
    **apart,
  )
  transform = optimizers.make(
    FLAGS.steps * FLAGS.epochs * (sizes.rows // sizes.minibatch),
    **cli.optimizer_options(FLAGS),
  )

  def prepare(state, reference, rollout, earned):
    """What stays fixed while a rollout is learnt from, and its metrics."""
    params, mask = state["params"], rollout.response_mask
    old, hidden, values = in_parts(functools.partial(forward, params), rollout)
    token_rewards, metrics = terms.place(earned, rollout)  # [N, T]
    if not sampler.has_constraint:  # Its masks differ from token to token.
      metrics |= batch_entropy(params, hidden, mask)[1]
    ref_log_probs = None
    if FLAGS.kl == "initial":
      ref_log_probs = read(reference, rollout).log_probs
      metrics["kl/coef"] = state["kl"].coef
      token_rewards += rewards.kl_penalty(
        *(old.log_probs, ref_log_probs, mask),
        kl_coef=state["kl"].coef,
        kind=FLAGS.kl_estimator,
      )
    metrics["reward/with_kl"] = token_rewards.sum(axis=1).mean()
    if FLAGS.whiten_rewards:  # Their mean stays.
      token_rewards = masking.masked_whiten(
        token_rewards, mask, shift_mean=False
      )
    token_advantages, returns = advantages.gae(
      token_rewards,
      values,
      mask,
      discount=FLAGS.discount,
      gae_lambda=FLAGS.gae_lambda,
    )
    if FLAGS.whiten_advantages:
      token_advantages = masking.masked_whiten(token_advantages, mask)
    metrics |= rollouts.metrics(rollout, old, ref_log_probs) | {
      "values/mean": masking.masked_mean(values, mask)
    }
    batch = {
      "rollout": rollout,
      "old_log_probs": old.log_probs,
      "old_values": values,
      "advantages": token_advantages,
      "returns": returns,
    }
    return jax.lax.stop_gradient(batch), metrics

  def learn(state, reference, rollout, earned, key):
    """All epochs of one rollout, without leaving the devices."""
    batch, metrics = prepare(state, reference, rollout, earned)

    def update(carry, rows):
      params, optimizer_state = carry
      minibatch = microbatch.take(batch, rows, run.rows_sharding)
      grads, metrics = gradients(sizes.num_parts)(
        params, minibatch, state["kl"].coef
      )
      params, optimizer_state, metrics = optimizers.step(
        transform, grads, optimizer_state, params, metrics
      )
      return (params, optimizer_state), metrics

    (params, optimizer_state), history = jax.lax.scan(
      update,
      (state["params"], state["optimizer"]),
      microbatch.orders(key, sizes, epochs=FLAGS.epochs),
    )
    controller = state["kl"]
    if FLAGS.kl_target:
      controller = controller.update(
        metrics["kl/sequence_k1"],
        sizes.rows,
        target=FLAGS.kl_target,
        horizon=FLAGS.kl_horizon,
      )
      metrics["kl/ignored"] = controller.num_ignored
    metrics |= microbatch.over_updates(history, FLAGS.epochs)
    state = {"params": params, "optimizer": optimizer_state, "kl": controller}
    return state, (metrics, batch["advantages"])

  # The state; a run that was stopped goes on from its last checkpoint.
  state = run.restore(
    {"policy": loaded.params, "critic": critic.params},
    critic.rules,
    optimizer=transform,
    kl=rewards.AdaptiveKL.create(FLAGS.kl_coef),
  )
  if reference is not None:
    reference = run.place(reference, critic.rules)
  learn = run.compile(learn, returns_state=True)

  def roll_out(step):
    """Samples and scores one batch: texts, and what `learn` takes."""
    rows = train.rows(FLAGS.batch_size, step, seed=FLAGS.seed)
    sample_key, learn_key = run.keys(step)
    samples = sampler.draw_scored(
      *(sample_key, state["params"]["policy"], train, rows),
      step=step,
      score=score,
      at_once=FLAGS.draw_batch_size,
    )
    return samples, (run.shard(samples.learnt), terms.earn(samples), learn_key)

  def evaluate(step):
    """Greedy answers to the held-out prompts; --keep_best keeps the best."""
    rows = answers.evaluate(answer, state["params"]["policy"], score)
    run.evaluated(step, rows)
    metrics = answers.means(rows)
    value = metrics.get("eval/is_correct", metrics["eval/reward"])
    run.keep_best(step, value, state["params"])
    return metrics

  if FLAGS.preflight != "off":  # Do sampler and learner agree?
    samples, inputs = roll_out(run.first_step)
    rollout = run.shard(samples.rollout)
    learn.compile(state, reference, *inputs)
    preflight.run(
      *(FLAGS.preflight, prepare, state, reference, rollout, inputs[1]),
      sampler=sampler,
      gradients=gradients,
      more=[state["kl"].coef],
      micro_batch=sizes.micro_batch,
      num_shards=meshes.num_batch_shards(run.mesh),
      tolerance=run.tolerance(state["params"]),
      parts_add_up=not FLAGS.batch_entropy_coef,
      programs=[sampler, terms, learn],
    )

  models = {"policy": loaded.params, "reference": reference}
  with run.training(policy, tokenizer, models, COLUMNS):
    for step in run.steps(freeze=[sampler, answer, terms, learn]):
      # Row `step` of the metrics is about the policy after `step` rollouts.
      metrics = {"rollouts": step * sizes.rows}
      if step % FLAGS.eval_every == 0:
        metrics |= evaluate(step)
      started = time.perf_counter()
      samples, inputs = roll_out(step)
      state, (learnt, weights) = learn(state, reference, *inputs)
      metrics |= jax.device_get(learnt)
      metrics |= answers.of_samples(samples, time.perf_counter() - started)
      run.log(step, metrics)
      run.show(step, samples, weights)
      run.save(step + 1, state)
    if run.is_complete:
      rollouts_drawn = {"rollouts": FLAGS.steps * sizes.rows}
      run.log(FLAGS.steps, rollouts_drawn | evaluate(FLAGS.steps))
      run.summarise(["reward/mean", "entropy/token", "entropy/batch"])
  return run.exit_status


def check_flags():
  """Raises ValueError for flags of PPO that do not fit each other."""
  for name in ("kl_target", "reference"):
    if FLAGS[name].value and FLAGS.kl != "initial":
      raise ValueError(f"--{name} has a meaning for --kl=initial alone.")
  is_masked = FLAGS.mask_in_loss and not FLAGS.batch_entropy_coef
  if FLAGS.constraint == "grammar" and not is_masked:
    raise ValueError(
      "--constraint=grammar allows other tokens in every row: it goes neither "
      "with --batch_entropy_coef nor with --nomask_in_loss."
    )


if __name__ == "__main__":
  cli.run(main)

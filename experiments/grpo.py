"""GRPO and its kin: policy gradients that compare responses to one prompt.

A minute or two on two CPU cores, after experiments/sft.py has made the policy
with experiments/flags/padula/sft_cpu.flags:

  python experiments/grpo.py --policy=runs/sft --workdir=runs/grpo \
    --flagfile=experiments/flags/grpo/arithmetic.flags

A group of --num_samples responses to a prompt is its own baseline. --algorithm
names a preset, one of PRESETS below; flags.json has what is in force.

Sources: GRPO, Shao et al. (2024), arXiv 2402.03300; Dr. GRPO, Liu et al.
(2025), arXiv 2503.20783; DAPO, Yu et al. (2025), arXiv 2503.14476; RLOO,
Ahmadian et al. (2024), arXiv 2402.14740; REINFORCE++, Hu et al. (2025), arXiv
2501.03262; GSPO, Zheng et al. (2025), arXiv 2507.18071; CISPO, MiniMax (2025),
arXiv 2506.13585. Departures: RLOO divides its sum over tokens by MAX_LENGTH,
which Adam takes back, and where several updates follow a rollout it clips the
ratio of each token. REINFORCE++ with baseline has the same advantage on all
tokens of a response, scaled by the batch's responses rather than its tokens;
the --kl_coef of both is ours, for the paper gives none that we know of.
"""

import functools
import time

import jax
import jax.numpy as jnp
from absl import flags

from rljax import cli
from rljax.distributed import meshes
from rljax.evaluation import answers
from rljax.generation import groups, rollouts, samplers
from rljax.losses import ppo
from rljax.models import hf
from rljax.ops import advantages, masking, rewards
from rljax.text import batches, prompts
from rljax.training import microbatch, optimizers, preflight, runs

# Flags of each algorithm, for those that are not given.
PRESETS = {
  "grpo": "advantage=grpo normalizer=sequence_mean kl=loss kl_coef=0.04",
  "dr_grpo": "advantage=dr_grpo normalizer=constant kl=none",
  "dapo": "advantage=grpo normalizer=token_mean kl=none clip_epsilon_high=0.28 "
  "dynamic_sampling=true overlong_buffer=max_length/5",
  "rloo": "advantage=rloo normalizer=constant kl=reward kl_coef=0.05",
  "reinforce_pp": "advantage=reinforce_pp normalizer=token_mean kl=reward "
  "kl_coef=0.01",
  "reinforce_pp_baseline": "advantage=reinforce_pp_baseline "
  "normalizer=token_mean kl=loss kl_estimator=k2 kl_coef=0.01",
  "gspo": "advantage=grpo normalizer=sequence_mean kl=none surrogate=gspo "
  "clip_epsilon=3e-4 clip_epsilon_high=4e-4",
  "cispo": "advantage=grpo normalizer=token_mean kl=none surrogate=cispo",
}
PAIRED = {"kl_estimator": "kl", "clip_epsilon_high": "clip_epsilon"}
# What advantages.group_relative scales by.
SCALES = {"grpo": "group", "dr_grpo": "none", "reinforce_pp_baseline": "batch"}

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_presets("grpo", PRESETS, paired=PAIRED)
cli.define_run(steps=1024, save_every=200, eval_every=100, samples_every=50)
cli.define_task(num_prompts=131_072, num_eval_prompts=512)
cli.define_prompts()
cli.define_models()
cli.define_sampler(max_length=256, num_samples=8, online=True)
cli.define_dynamic_sampling()
cli.define_overlong_penalty()
cli.define_kl(
  "loss",
  ["none", "reward", "loss"],
  "KL penalty to --reference: none, on the rewards of tokens, or in the loss.",
  kl_coef=0.04,
  estimator="",
)
cli.define_batches(16, epochs=1, text="Prompts of each step.", minibatches=True)
cli.define_optimizer(1e-6, warmup=0.03, max_grad_norm=1.0)

# Flags of GRPO and its kin.
flags.DEFINE_enum(
  "advantage",
  "grpo",
  [*SCALES, "rloo", "reinforce_pp"],
  "The algorithm by which rewards become advantages; see ops/advantages.py.",
)
flags.DEFINE_enum(
  "surrogate",
  "clipped",
  ["clipped", "gspo", "cispo"],
  "Policy loss: clipped bounds the ratio of a token, gspo that of a response; "
  "cispo bounds the weights of tokens and keeps all their gradients.",
)
flags.DEFINE_enum(
  "normalizer",
  "sequence_mean",
  ppo.NORMALIZERS,
  "Average of token losses: token_mean over all tokens, sequence_mean over the "
  "means of responses; constant divides by responses times --max_length.",
)
flags.DEFINE_float(
  "clip_epsilon", 0.2, "How far a ratio may fall below 1; above 0.", 1e-9
)
flags.DEFINE_float(
  "clip_epsilon_high",
  0.0,
  "How far it may rise above 1; 0: as far as below.",
  0,
)
flags.register_multi_flags_validator(
  ["advantage", "num_samples"],
  lambda v: v["advantage"] == "reinforce_pp" or v["num_samples"] > 1,
  "--advantage compares responses to one prompt, except reinforce_pp: "
  "--num_samples must be at least 2.",
)
flags.register_multi_flags_validator(
  ["surrogate", "advantage", "normalizer"],
  lambda v: (
    v["surrogate"] != "gspo"
    or v["advantage"] != "reinforce_pp"
    and v["normalizer"] == "sequence_mean"
  ),
  "--surrogate=gspo is a mean over responses with one advantage each: "
  "--normalizer must be sequence_mean, and --advantage not reinforce_pp.",
)
FLAGS = flags.FLAGS

COLUMNS = (
  *("reward/mean", "task/is_correct", "groups/acceptance", "entropy/token"),
  *("ppo/approx_kl", "tokens_per_second"),
)


def main():
  run = runs.start(FLAGS, total_steps=FLAGS.steps)
  run.note(cli.preset(FLAGS, PRESETS))
  sizes = cli.batch_sizes(FLAGS, run.mesh, num_samples=FLAGS.num_samples)

  # Models: the policy, and that of the KL penalty.
  loaded = cli.load_policy(FLAGS)
  policy, tokenizer = loaded.model, loaded.tokenizer
  reference = None
  if FLAGS.kl != "none":
    reference = cli.load_reference(FLAGS, loaded).params

  # Text: prompts, what writes responses, and what scores them.
  task = cli.load_task(FLAGS)
  train, held_out = prompts.load(task, tokenizer, **cli.prompt_options(FLAGS))
  sampler = samplers.Sampler(
    policy, tokenizer, cli.sampler_settings(FLAGS), mesh=run.mesh, task=task
  )
  answer = sampler.greedy(held_out, batch_size=FLAGS.batch_size)
  score = cli.task_scorer(FLAGS, task)
  score(held_out.texts[:1], [""])  # Bad options show here, not after a rollout.

  # What is differentiated.
  statistics_of = functools.partial(
    rollouts.token_statistics,
    policy,
    temperature=FLAGS.temperature,
    allowed=sampler.allowed,
    chunk_size=FLAGS.chunk_size,
  )
  clip_high = FLAGS.clip_epsilon_high or FLAGS.clip_epsilon
  clip = {"clip_epsilon": FLAGS.clip_epsilon, "clip_epsilon_high": clip_high}
  average = {"normalizer": FLAGS.normalizer}
  kl_estimator = FLAGS.kl_estimator or ("k3" if FLAGS.kl == "loss" else "k1")

  # A rollout's one update reads the policy before it anyway: a pass by itself
  # is for further updates, and for rewards that depend on it.
  reads_old = sizes.num_updates(FLAGS.epochs) > 1 or FLAGS.kl == "reward"

  def loss_fn(params, batch):
    mask, weights = batch["rollout"].response_mask, batch["advantages"]
    statistics, _ = statistics_of(params["policy"], batch["rollout"])
    now = statistics.log_probs
    old = batch.get("old_log_probs", jax.lax.stop_gradient(now))
    if FLAGS.surrogate == "clipped":
      loss, metrics = ppo.clipped_policy_loss(
        now, old, weights, mask, **clip, **average
      )
    elif FLAGS.surrogate == "gspo":  # Weights are alike within a response.
      loss, metrics = ppo.gspo_loss(now, old, weights[:, 0], mask, **clip)
    else:
      loss, metrics = ppo.cispo_loss(
        now, old, weights, mask, max_ratio=1.0 + clip_high, **average
      )
    if FLAGS.kl == "loss":
      drift = ppo.kl_to_reference(
        now, batch["ref_log_probs"], mask, kind=kl_estimator, **average
      )
      loss += FLAGS.kl_coef * drift
      metrics["kl/loss"] = jax.lax.stop_gradient(drift)
    if not reads_old:
      metrics[microbatch.ROWS] = statistics
    return loss, {"loss": loss, **metrics}

  # A micro-batch weighs by its share of what the normalizer divides by.
  apart = {"sharding": run.rows_sharding, "buckets": sizes.buckets}
  gradients = functools.partial(
    microbatch.grad,
    loss_fn,
    weigh=lambda part: ppo.num_terms(part["rollout"].response_mask, **average),
    **apart,
  )
  transform = optimizers.make(
    FLAGS.steps * sizes.num_updates(FLAGS.epochs),
    **cli.optimizer_options(FLAGS),
  )

  def read(params, rollout):
    """Statistics of all rows, in no more memory than an update takes."""
    one = lambda part: statistics_of(params, part)[0]
    return microbatch.map_rows(one, rollout, sizes.num_passes, **apart)

  def describe(batch, old):
    """Metrics of the policy that drew a rollout."""
    return rollouts.metrics(batch["rollout"], old, batch.get("ref_log_probs"))

  def prepare(state, reference, rollout, scores, with_old=True):
    """What stays fixed while a rollout is learnt from, and its metrics."""
    mask, shaped = rollout.response_mask, scores
    batch, metrics = {"rollout": rollout}, {}
    if FLAGS.overlong_buffer:
      shaped += rewards.overlong_penalty(
        mask.sum(axis=1),
        max_length=FLAGS.max_length,
        buffer=FLAGS.overlong_buffer,
      )
    token_rewards = rewards.place_score(shaped, mask)  # [N, T]
    if FLAGS.kl != "none":
      batch["ref_log_probs"] = read(reference, rollout).log_probs
      metrics["kl/coef"] = FLAGS.kl_coef
    if with_old:
      old = read(state["params"]["policy"], rollout)
      batch["old_log_probs"] = old.log_probs
      metrics |= describe(batch, old)
    if FLAGS.kl == "reward":
      token_rewards += rewards.kl_penalty(
        *(old.log_probs, batch["ref_log_probs"], mask),
        kl_coef=FLAGS.kl_coef,
        kind=kl_estimator,
      )
    # The rows of a group lie next to each other.
    totals = token_rewards.sum(axis=1).reshape(-1, FLAGS.num_samples)  # [B, G]
    counts = mask.any(axis=1).reshape(totals.shape)
    if FLAGS.advantage == "reinforce_pp":
      batch["advantages"] = advantages.reinforce_pp(token_rewards, mask)
    else:
      if FLAGS.advantage == "rloo":
        relative = advantages.leave_one_out(totals, counts)
      else:
        relative = advantages.group_relative(
          totals, counts, scale=SCALES[FLAGS.advantage]
        )
      if FLAGS.dynamic_sampling:
        # Where they had to fill the batch, groups of equal scores teach
        # nothing, whatever their lengths or drifts add to the rewards.
        differ = groups.differ(scores.reshape(totals.shape))
        relative = jnp.where(differ[:, None], relative, 0.0)
      batch["advantages"] = jnp.where(mask, relative.reshape(-1, 1), 0.0)
    metrics |= {
      "reward/shaped": masking.masked_mean(totals, counts),
      "reward/group_std": groups.deviation(totals, counts),
      "advantage/abs": masking.masked_mean(jnp.abs(batch["advantages"]), mask),
    }
    return jax.lax.stop_gradient(batch), metrics

  def learn(state, reference, rollout, scores, key):
    """All epochs of one rollout, without leaving the devices."""
    batch, metrics = prepare(state, reference, rollout, scores, reads_old)

    def update(carry, rows):
      params, optimizer_state = carry
      minibatch = microbatch.take(batch, rows, run.rows_sharding)
      grads, metrics = gradients(sizes.num_parts)(params, minibatch)
      if not reads_old:
        metrics |= describe(minibatch, metrics.pop(microbatch.ROWS))
      params, optimizer_state, metrics = optimizers.step(
        transform, grads, optimizer_state, params, metrics
      )
      return (params, optimizer_state), metrics

    (params, optimizer_state), history = jax.lax.scan(
      update,
      (state["params"], state["optimizer"]),
      microbatch.orders(key, sizes, epochs=FLAGS.epochs),
    )
    metrics |= microbatch.over_updates(history, FLAGS.epochs)
    state = {"params": params, "optimizer": optimizer_state}
    return state, (metrics, batch["advantages"])

  # The state; a run that was stopped goes on from its last checkpoint.
  rules = hf.partition_rules(policy, run.mesh)
  state = run.restore({"policy": loaded.params}, rules, optimizer=transform)
  position = run.meta.get("position", 0)  # Batches of prompts that were drawn.
  if reference is not None:
    reference = run.place(reference, rules)
  learn = run.compile(learn, returns_state=True)

  def roll_out(step, position):
    """Draws groups until there are enough: those, and what `learn` takes."""
    sample_key, learn_key = run.keys(step)

    def draw(number):
      rows = batches.batch_indices(
        len(train), FLAGS.batch_size, position + number, seed=FLAGS.seed
      )
      key = jax.random.fold_in(sample_key, number)
      params = state["params"]["policy"]
      return sampler.draw_scored(
        *(key, params, train, rows),
        step=step,
        number=number,
        score=score,
        at_once=FLAGS.draw_batch_size,
      )

    max_rounds = FLAGS.max_sampling_rounds if FLAGS.dynamic_sampling else 1
    found = groups.collect(draw, FLAGS.batch_size, max_rounds=max_rounds)
    inputs = run.shard((found.samples.learnt, found.samples.learnt_scores))
    return found, (*inputs, learn_key)

  def evaluate(step):
    """Greedy answers to the held-out prompts; --keep_best keeps the best."""
    rows = answers.evaluate(answer, state["params"]["policy"], score)
    run.evaluated(step, rows)
    metrics = answers.means(rows)
    value = metrics.get("eval/is_correct", metrics["eval/reward"])
    run.keep_best(step, value, state["params"])
    return metrics

  if FLAGS.preflight != "off":  # Do sampler and learner agree?
    found, inputs = roll_out(run.first_step, position)
    rollout = run.shard(found.samples.rollout)
    learn.compile(state, reference, *inputs)
    preflight.run(
      *(FLAGS.preflight, prepare, state, reference, rollout, inputs[1]),
      sampler=sampler,
      gradients=gradients,
      micro_batch=sizes.micro_batch,
      num_shards=meshes.num_batch_shards(run.mesh),
      tolerance=run.tolerance(state["params"]),
      programs=[sampler, learn],
    )

  starts_from = {"policy": loaded.params, "reference": reference}
  with run.training(policy, tokenizer, starts_from, COLUMNS):
    for step in run.steps(freeze=[sampler, answer, learn]):
      # Row `step` of the metrics is about the policy after `step` steps, for
      # which so many responses were drawn, learnt from or not.
      metrics = {"rollouts": position * sizes.rows}
      if step % FLAGS.eval_every == 0:
        metrics |= evaluate(step)
      started = time.perf_counter()
      found, inputs = roll_out(step, position)
      position += found.num_rounds
      state, (learnt, weights) = learn(state, reference, *inputs)
      metrics |= jax.device_get(learnt) | found.metrics()
      metrics |= answers.of_samples(
        found.samples, time.perf_counter() - started, drawn=found.drawn
      )
      run.log(step, metrics)
      run.show(step, found.samples, weights)
      run.save(step + 1, state, position=position)
    if run.is_complete:
      metrics = {"rollouts": position * sizes.rows, **evaluate(FLAGS.steps)}
      run.log(FLAGS.steps, metrics)
      run.summarise(["reward/mean", "entropy/token", "groups/acceptance"])
  return run.exit_status


if __name__ == "__main__":
  cli.run(main)

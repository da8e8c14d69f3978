"""Flags that scripts share: their bounds, their help and their readers.

A script calls the groups that it needs, with its own defaults, and defines what
is its algorithm's alone:

  cli.define_run(steps=1024, save_every=200, eval_every=100)
  cli.define_models()
  flags.DEFINE_float("discount", 1.0, "γ of the returns, per response token.")
  FLAGS = flags.FLAGS

  def main():
    run = runs.start(FLAGS, total_steps=FLAGS.steps)
    loaded = cli.load_policy(FLAGS)
    ...

  if __name__ == "__main__":
    cli.run(main)

A default that differs from script to script is an argument of the group. This
is the one room of the library that knows flags by their names.
"""

from rljax.cli.data import (
  define_cache,
  define_dev,
  define_held_out,
  define_lengths,
  define_log,
  define_prompts,
  define_task,
  encode_options,
  file_options,
  length_options,
  load_known,
  load_task,
  prompt_format,
  prompt_options,
  read_dev,
  read_log,
  require_examples,
  require_prompts,
  solved_options,
)
from rljax.cli.entry import (
  check,
  check_read,
  may_change,
  may_grow,
  require,
  run,
)
from rljax.cli.examples import (
  define_examples,
  define_stream,
  example_options,
  open_comparisons,
  open_rankings,
  open_stream,
  pack_feed,
)
from rljax.cli.learning import (
  batch_sizes,
  define_batches,
  define_max_skipped,
  define_optimizer,
  define_packing,
  optimizer_options,
  pack_pairs,
  packer,
  schedule_options,
)
from rljax.cli.models import (
  define_compute,
  define_models,
  define_random_model,
  load_like,
  load_policy,
  load_reference,
  model_options,
  random_model_options,
)
from rljax.cli.rewards import (
  define_adaptive_kl,
  define_kl,
  define_pairwise,
  define_reasoning,
  define_reward_model,
  define_reward_terms,
  define_rewriting,
  load_reward_model,
  load_reward_terms,
  load_scorer,
  pairwise_options,
  reward_model_options,
  task_scorer,
)
from rljax.cli.running import (
  define_preflight,
  define_presets,
  define_run,
  preset,
)
from rljax.cli.sampling import (
  define_dynamic_sampling,
  define_ends,
  define_overlong_penalty,
  define_replies,
  define_sampler,
  define_stop_strings,
  has_end,
  load_responder,
  sampler_settings,
)
from rljax.cli.selection import load_selection

# Flags of the groups below whose default, or help, the script chooses. All
# others are the same in all scripts.
SCRIPTS_CHOOSE = frozenset(
  (
    *("steps", "save_every", "eval_every", "samples_every", "keep_best"),
    *("num_page_samples", "task", "num_prompts", "num_eval_prompts"),
    *("eval_split", "max_response_length", "too_long", "policy"),
    *("hidden_size", "num_layers", "max_positions", "max_length"),
    *("num_samples", "temperature", "top_p", "sample_batch_size"),
    *("reward_model", "kl", "kl_coef", "kl_estimator", "batch_size", "epochs"),
    *("learning_rate", "schedule", "warmup", "weight_decay", "max_grad_norm"),
    *("template", "locate", "data", "eval_data", "eval_share"),
  )
)

__all__ = (
  "SCRIPTS_CHOOSE",
  "batch_sizes",
  "check",
  "check_read",
  "define_adaptive_kl",
  "define_batches",
  "define_cache",
  "define_compute",
  "define_dev",
  "define_dynamic_sampling",
  "define_ends",
  "define_examples",
  "define_kl",
  "define_lengths",
  "define_held_out",
  "define_log",
  "define_models",
  "define_max_skipped",
  "define_optimizer",
  "define_pairwise",
  "define_overlong_penalty",
  "define_packing",
  "define_preflight",
  "define_prompts",
  "define_presets",
  "define_random_model",
  "define_reasoning",
  "define_replies",
  "define_reward_model",
  "define_reward_terms",
  "define_rewriting",
  "define_run",
  "define_sampler",
  "define_stop_strings",
  "define_stream",
  "define_task",
  "encode_options",
  "example_options",
  "file_options",
  "length_options",
  "has_end",
  "load_known",
  "load_like",
  "load_policy",
  "load_reference",
  "load_responder",
  "load_reward_model",
  "load_reward_terms",
  "load_scorer",
  "load_selection",
  "load_task",
  "may_change",
  "may_grow",
  "model_options",
  "open_comparisons",
  "open_rankings",
  "open_stream",
  "optimizer_options",
  "pack_feed",
  "pack_pairs",
  "packer",
  "pairwise_options",
  "preset",
  "prompt_format",
  "prompt_options",
  "random_model_options",
  "read_dev",
  "read_log",
  "require",
  "require_examples",
  "require_prompts",
  "reward_model_options",
  "run",
  "sampler_settings",
  "schedule_options",
  "solved_options",
  "task_scorer",
)

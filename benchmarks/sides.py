"""Training loops that take a step when they are told to.

Each runs in a process of its own, which `benchmarks.step` starts and talks to:
rljax by experiments/grpo.py as it stands, TRL by its GRPOTrainer. A line on one
pipe begins a step, and one on the other says how long it took.
"""

import functools
import json
import os
import runpy
import sys
import time

SCRIPT = "experiments/grpo.py"


def vowels(prompts, completions, **columns):
  """Share of vowels, a reward that costs nothing, as TRL calls it."""
  del prompts, columns
  return [
    sum(x in "aeiou" for x in text) / max(len(text), 1) for text in completions
  ]


class Turns:
  """Waits for its turn before every step, and reports the one before it."""

  def __init__(self, wait, tell):
    """Takes two file descriptors, to read and to write."""
    self._wait, self._tell = os.fdopen(wait), os.fdopen(tell, "w")
    self._began, self._cpu, self._rollout = None, 0.0, 0.0

  def __call__(self):
    """Ends a step and begins the next one, or the process."""
    found = {}
    if self._began is not None:
      seconds = time.perf_counter() - self._began
      found = {"step": seconds, "rollout": self._rollout}
      found["update"] = seconds - self._rollout
      found["CPU"] = time.process_time() - self._cpu
    print(json.dumps(found), file=self._tell, flush=True)
    if not self._wait.readline():
      os._exit(0)
    self._began, self._rollout = time.perf_counter(), 0.0
    self._cpu = time.process_time()

  def of_rollout(self, function):
    """Adds what a function takes to the time of the rollout."""

    @functools.wraps(function)
    def timed(*args, **kwargs):
      began = time.perf_counter()
      try:
        return function(*args, **kwargs)
      finally:
        self._rollout += time.perf_counter() - began

    return timed


def of_rljax(turns, arguments, *, with_pass):
  """Runs the script; `with_pass` as where a rollout has two updates."""
  from rljax.generation import samplers
  from rljax.training import microbatch, runs

  steps = runs.Run.steps

  def in_turns(run, **options):
    for step in steps(run, **options):
      turns()
      yield step

  runs.Run.steps = in_turns
  draw = samplers.Sampler.draw_scored
  samplers.Sampler.draw_scored = turns.of_rollout(draw)
  if with_pass:
    microbatch.Sizes.num_updates = lambda sizes, epochs: 2
  sys.argv = [SCRIPT, *arguments]
  runpy.run_path(SCRIPT, run_name="__main__")


def of_trl(turns, *, model, prompts, threads, rows, **settings):
  """Trains a folder's model by GRPO, a batch of `rows` responses a step."""
  import datasets
  import torch
  import transformers
  import trl

  torch.set_num_threads(threads)

  class InTurns(transformers.TrainerCallback):
    def on_step_begin(self, *_, **__):
      turns()

  trainer = trl.GRPOTrainer(
    transformers.AutoModelForCausalLM.from_pretrained(
      model, dtype=torch.float32
    ),
    vowels,
    args=trl.GRPOConfig(
      per_device_train_batch_size=rows,
      gradient_accumulation_steps=1,
      loss_type="grpo",
      beta=0.0,
      learning_rate=1e-6,
      lr_scheduler_type="constant",
      weight_decay=0.0,
      max_grad_norm=1.0,
      max_steps=10_000,
      use_cpu=True,
      gradient_checkpointing=False,
      save_strategy="no",
      logging_steps=1,
      report_to="none",
      disable_tqdm=True,
      **settings,
    ),
    train_dataset=datasets.Dataset.from_list([{"prompt": x} for x in prompts]),
    processing_class=transformers.AutoTokenizer.from_pretrained(model),
    callbacks=[InTurns()],
  )
  generate = trainer._generate_and_score_completions
  trainer._generate_and_score_completions = turns.of_rollout(generate)
  trainer.train()


if __name__ == "__main__":
  wait, tell, side, options = sys.argv[1:]
  run = of_trl if side == "trl" else of_rljax
  run(Turns(int(wait), int(tell)), **json.loads(options))

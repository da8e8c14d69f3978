"""What fits on which machine, and how fast it can be at most.

  python -m benchmarks.plans --data=FOLDER --json=benchmarks/results/plans.json

GRPO on GSM8K with the settings of a flagfile, for language models of five sizes
that train whole or by adapters, and machines that are not there: `python -m
rljax.plan` compiles the optimizer's start, the sampler and the learner at two
depths, and extrapolates. The models have the sizes of well-known ones; their
prompts are counted with the tokenizer of SmolLM2, whatever their own is. Rows
that the file has already are left alone, so that a run may be stopped; those
that a reader may miss most come first. TPUs and GPUs need what
rljax/plan/targets.py names.

`python -m benchmarks.plans --from_results` prints the tables of
docs/devices.md.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

from benchmarks import machine

flags.DEFINE_string("data", "", "Folder with GSM8K.")
flags.DEFINE_list("rows", [], "Rows to plan, as model@machine; empty for all.")
flags.DEFINE_integer("timeout", 1500, "Seconds after which a row is given up.")
FLAGS = flags.FLAGS

FLAGFILE = "experiments/flags/grpo/qwen25_05b_gsm8k.flags"
LAYERS = "1,2"


def _model(layers, width, heads, kv_heads, feed_forward, vocab_size, **more):
  return {
    "model_type": "llama",
    "num_hidden_layers": layers,
    "hidden_size": width,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "intermediate_size": feed_forward,
    "vocab_size": vocab_size,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    **more,
  }


# The shapes of models that are known; the parameters in billions.
QWEN = {"model_type": "qwen2"}
MODELS = {
  "0.135B": _model(30, 576, 9, 3, 1536, 49152),
  "0.5B": _model(24, 896, 14, 2, 4864, 151936, **QWEN),
  "1.5B": _model(28, 1536, 12, 2, 8960, 151936, **QWEN),
  "3B": _model(28, 3072, 24, 8, 8192, 128256),
  "8B": _model(32, 4096, 32, 8, 14336, 128256, tie_word_embeddings=False),
}
# How much of a model is trained.
KINDS = {
  "full": (),
  "LoRA": ("--lora_rank=16", "--base_dtype=bfloat16"),
}
# Machines, with the mesh of each. A pass reads eight rows on each device.
MACHINES = {
  "v5e-1": "data:1",
  "v5e-4": "fsdp:4",
  "v5e-8": "fsdp:8",
  "v5e-16": "fsdp:16",
  "v6e-8": "fsdp:8",
  "v5p-8": "fsdp:4",
  "h100:1": "data:1",
  "h200:1": "data:1",
  "h100:8": "fsdp:8",
}
ROWS_OF_A_DEVICE = 8
# Large ones first, where it fits or just does not.
ROWS = tuple(
  f"{model} {kind}@{machine}"
  for machine in (
    *("h100:8", "h100:1", "v5p-8", "v5e-8", "v5e-1"),
    *("v6e-8", "h200:1", "v5e-4", "v5e-16"),
  )
  for kind in KINDS
  for model in reversed(MODELS)
)


def main(_):
  path = pathlib.Path(FLAGS.json) if FLAGS.json else None
  if FLAGS.from_results:
    found = json.loads((machine.RESULTS / "plans.json").read_text())
  else:
    found = json.loads(path.read_text()) if path and path.exists() else {}
    for row in FLAGS.rows or ROWS:
      if row not in found:
        found[row] = plan(*row.split("@"))
        if path:
          ordered = {name: found[name] for name in ROWS if name in found}
          path.write_text(json.dumps(ordered, indent=1) + "\n")
  print("\n".join([*overview(found), "", *table(found)]))


def plan(model, target):
  """One row: what is said of a model on a machine, or why there is nothing."""
  model, kind = model.split()
  mesh = MACHINES[target]
  num_rows = ROWS_OF_A_DEVICE * int(mesh.rpartition(":")[2])
  with tempfile.TemporaryDirectory() as folder:
    config = pathlib.Path(folder, "policy", "config.json")
    config.parent.mkdir()
    config.write_text(json.dumps(MODELS[model]))
    output = pathlib.Path(folder, "plan.json")
    command = [
      *(sys.executable, "-m", "rljax.plan", f"--target={target}"),
      *(f"--layers={LAYERS}", "--programs=optimizer,sample,learn"),
      *("--tokenizer=smollm2-135m", f"--json={output}", "--"),
      *("experiments/grpo.py", f"--flagfile={FLAGFILE}"),
      *(f"--policy={config.parent}", f"--task_options=data={FLAGS.data}"),
      *(f"--mesh={mesh}", f"--micro_batch_size={num_rows}", *KINDS[kind]),
    ]
    try:
      done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=FLAGS.timeout,
        check=False,
      )
    except subprocess.TimeoutExpired:
      return {"failed": f"not compiled within {FLAGS.timeout} s"}
    if not output.exists():
      reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
      print(f"{model} {kind}@{target} failed: {done.stderr[-2000:]}")
      return {"failed": reason[:200]}
    content = json.loads(output.read_text())
  keep = (
    "name",
    "seconds",
    "memory",
    "beside",
    "peak",
    "error",
    "rounds",
    "warnings",
  )
  return {
    "layers": LAYERS,
    "summary": content["summary"],
    "programs": [{k: row[k] for k in keep} for row in content["programs"]],
  }


def overview(found):
  """Lines of the table of models and machines, in Markdown."""
  yield f"| model | trained | {' | '.join(f'`{x}`' for x in MACHINES)} |"
  yield f"|---|---|{'---:|' * len(MACHINES)}"
  for model in MODELS:
    for kind in KINDS:
      rows = [found.get(f"{model} {kind}@{x}") for x in MACHINES]
      yield f"| {model} | {kind} | {' | '.join(map(_cell, rows))} |"


def _cell(row):
  """Memory, least time of a step and MFU, or that it does not fit."""
  if row is None or "failed" in row:
    return "?"
  summary = row["summary"]
  peak = f"{summary['peak'] / 1e9:.1f}"
  if not summary["fits"]:
    is_known = not any(x["error"] for x in row["programs"])
    return f"no ({peak})" if is_known else "no"
  return f"{peak}, {summary['step']:.2g} s, {summary['mfu']:.0%}"


def table(found):
  """Lines of the table of all that was compiled, in Markdown."""
  yield (
    "| model | machine | sampler, GB | learner, GB | of | decode step, ms | "
    "bound by | update, s | bound by | MFU of it |"
  )
  yield "|---|---|---:|---:|---:|---:|---|---:|---|---:|"
  for name, row in found.items():
    if "failed" in row:
      continue
    model, target = name.split("@")
    summary = row["summary"]
    peaks = {x["name"]: _peak(x) for x in row["programs"]}
    cells = [
      *(model, f"`{target}`", peaks["sample"], peaks["learn"]),
      f"{summary['room'] / 1e9:.1f}",
      *_times(summary),
    ]
    yield f"| {' | '.join(cells)} |"


def _peak(program):
  if program["error"]:
    return "too much"
  return f"{program['peak'] / 1e9:.1f}"


def _times(summary):
  step, update = summary["decode_step"], summary["update"]
  if not summary["fits"] or not step:
    return [""] * 5
  return [
    *(f"{1e3 * max(step.values()):.2f}", max(step, key=step.get)),
    *(f"{max(update.values()):.1f}", max(update, key=update.get)),
    f"{update['products'] / max(update.values()):.0%}",
  ]


if __name__ == "__main__":
  app.run(main)

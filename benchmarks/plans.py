"""What fits on which machine, and how fast it can be at most.

  python -m benchmarks.plans --data=FOLDER --json=benchmarks/results/plans.json

GRPO on GSM8K with the settings of a flagfile, for language models of six sizes
and machines that are not there: `python -m rljax.plan` compiles the optimizer's
start, the sampler and the learner at two depths, and extrapolates. The
models have the sizes of well-known ones; their prompts are counted with the
tokenizer of SmolLM2, whatever their own is. Rows that the file has already are
left alone, so that a run may be stopped. TPUs and GPUs need what
rljax/plan/targets.py names.

`python -m benchmarks.plans --from_results` prints the table of docs/devices.md.
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
# Machines, with the mesh of each.
MACHINES = {
  "v5e-1": "data:1",
  "v5e-4": "fsdp:4",
  "v5e-8": "fsdp:8",
  "v6e-8": "fsdp:8",
  "v5p-8": "fsdp:4",
  "h100:1": "data:1",
  "h100:8": "fsdp:8",
}
# Those that are worth a compilation: where it fits, and where it just does not.
ROWS = (
  *("0.135B@v5e-1", "0.135B@h100:1"),
  *("0.5B@v5e-1", "0.5B@v5e-4", "0.5B@h100:1", "0.5B@h100:8"),
  *("1.5B@v5e-4", "1.5B@v5e-8", "1.5B@v5p-8", "1.5B@h100:1", "1.5B@h100:8"),
  *("3B@v5e-8", "3B@v6e-8", "3B@v5p-8", "3B@h100:8"),
  *("8B@v5e-8", "8B@v6e-8", "8B@v5p-8", "8B@h100:8"),
)


def main(_):
  path = pathlib.Path(FLAGS.json) if FLAGS.json else None
  if FLAGS.from_results:
    found = json.loads((machine.RESULTS / "plans.json").read_text())
    print("\n".join(table(found)))
    return
  found = json.loads(path.read_text()) if path and path.exists() else {}
  for row in FLAGS.rows or ROWS:
    if row not in found:
      found[row] = plan(*row.split("@"))
      if path:
        ordered = {name: found[name] for name in ROWS if name in found}
        path.write_text(json.dumps(ordered, indent=1) + "\n")
  print("\n".join(table(found)))


def plan(model, target):
  """One row: what is said of a model on a machine, or why there is nothing."""
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
      f"--mesh={MACHINES[target]}",
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
      raise SystemExit(f"{model}@{target} took too long.") from None
    if not output.exists():
      raise SystemExit(f"{model}@{target} failed: {done.stderr[-2000:]}")
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


def table(found):
  """Lines of the table, in Markdown."""
  yield (
    "| model | machine | mesh | layers | sampler, GB | learner, GB | of | fits "
    "| decode step, ms | bound by | step, s | MFU at most |"
  )
  yield "|---|---|---|---|---:|---:|---:|---|---:|---|---:|---:|"
  for name, row in found.items():
    model, target = name.split("@")
    summary = row["summary"]
    peaks = {x["name"]: _peak(x) for x in row["programs"]}
    cells = [
      *(model, f"`{target}`", f"`{MACHINES[target]}`"),
      row["layers"].replace(",", " and "),
      *(peaks["sample"], peaks["learn"], f"{summary['room'] / 1e9:.1f}"),
      "yes" if summary["fits"] else "no",
      *_times(summary),
    ]
    yield f"| {' | '.join(cells)} |"


def _peak(program):
  if program["error"]:
    return "too much"
  return f"{program['peak'] / 1e9:.1f}"


def _times(summary):
  step = summary["decode_step"]
  if not summary["fits"] or not step:
    return ["", "", "", ""]
  bound = max(step, key=step.get)
  return [
    f"{1e3 * max(step.values()):.2f}",
    bound,
    f"{summary['step']:.1f}",
    f"{summary['mfu']:.0%}",
  ]


if __name__ == "__main__":
  app.run(main)

"""Tests of the flags that scripts share, and of how scripts read them."""

import functools
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from absl import flags
from absl.testing import absltest, parameterized

from rljax import cli
from rljax.cli import entry, models, terminal
from tests import conftest

SCRIPTS = sorted(
  path.relative_to(conftest.REPOSITORY).as_posix()
  for path in (conftest.REPOSITORY / "experiments").rglob("*.py")
)
# Runs each job of a list in a process of its own, which need not import
# anything again, and prints what came of it.
FORKS = """
import json, os, runpy, sys, tempfile
import rljax.cli

def outcome(job):
  files = [tempfile.TemporaryFile("w+") for _ in range(2)]
  child = os.fork()
  if not child:
    for file, number in zip(files, (1, 2)):
      os.dup2(file.fileno(), number)
    status = 1
    try:
      if job["kind"] == "run":
        sys.argv = [job["script"], *job["words"]]
        runpy.run_path(job["script"], run_name="__main__")
      else:
        sys.argv = [job["script"]]
        runpy.run_path(job["script"], run_name="script")
        from absl import flags
        own = flags.FLAGS.get_key_flags_for_module(job["script"])
        own += flags.FLAGS.get_key_flags_for_module("script")
        print(json.dumps({
          flag.name: {
            "help": flag.help,
            "type": type(flag.parser).__name__,
            "default": flag.default,
            "may_change": getattr(flag, "may_change", False),
          }
          for flag in own
        }))
      status = 0
    except SystemExit as end:
      status = end.code or 0
    except BaseException:
      import traceback
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  for file in files:
    file.seek(0)
  return {"status": status, "out": files[0].read(), "err": files[1].read()}

for job in json.load(sys.stdin):
  print(json.dumps(outcome(job)), flush=True)
"""
# A script of three groups, which prints what it is given.
SCRIPT = '''"""A script that trains nothing."""

import os

from absl import flags

from rljax import cli
from rljax.cli import entry, terminal

cli.define_run(steps=8, eval_every=2)
cli.define_batches(16, minibatches=True)
cli.define_task()
flags.DEFINE_string("policy", "", "A model that nobody loads.")
cli.define_sampler(max_length=4, online=True)
cli.define_optimizer(1e-3)
flags.DEFINE_float("discount", 1.0, "Discount of a token.", 0, 1)
flags.DEFINE_string("data", "", "Rows that nobody reads.")
FLAGS = flags.FLAGS


def main():
  if FLAGS.seed == 7:
    raise ValueError("--seed=7 brings bad luck.")
  if FLAGS.seed == 8:
    raise KeyError("seed")
  if FLAGS.seed == 9:
    raise OSError(28, "No space left on device", "rows.txt")
  print(FLAGS.workdir, FLAGS.compilation_cache, FLAGS.data, sep="\\n")
  return 3


if __name__ == "__main__":
  cli.run(main)
'''


def _forked(jobs):
  """What each job printed, and its status."""
  done = subprocess.run(
    [sys.executable, "-c", FORKS],
    cwd=conftest.REPOSITORY,
    input=json.dumps(jobs),
    capture_output=True,
    text=True,
    timeout=600,
    check=True,
  )
  return [json.loads(line) for line in done.stdout.splitlines()]


# Words of a command line, and what is said of them.
CASES = {
  # What is no flag.
  "file": (["rows.jsonl"], r"'rows.jsonl' on the command line is not a flag"),
  "missing_dashes": (["steps=50"], "'steps=50' .*; write --steps=50"),
  "word_behind_flags": (["--steps=5", "x"], "'x' .* is not a flag: flags begi"),
  "unknown": (["--stepps=5"], "Unknown command line flag 'stepps'"),
  "elsewhere": (["--stream"], "flag 'stream'.*; sft.py, .* rank, filter"),
  "no_workdir": ([], "--workdir must have a value"),
  # Numbers.
  "steps_0": (["--steps=0"], "--steps=0: 0 is not a positive integer"),
  "steps_text": (["--steps=many"], "--steps=many: "),
  "rate_below_0": (["--learning_rate=-1"], "--learning_rate=-1: .*non-negativ"),
  "rate_nan": (["--learning_rate=nan"], "learning_rate(=nan)? .*(finite|nan)"),
  "rate_infinite": (["--learning_rate=inf"], "--learning_rate must be a finit"),
  "rate_huge": (["--learning_rate=1e39"], "--learning_rate must be a finite n"),
  "discount_above_1": (["--discount=1.5"], "--discount=1.5: .*1"),
  "save_every_0": (["--save_every=0"], "--save_every=0: "),
  "eval_every_0": (["--eval_every=0"], "--eval_every=0: "),
  "batch_size_0": (["--batch_size=0"], "--batch_size=0: "),
  "micro_batch_below_0": (["--micro_batch_size=-1"], "--micro_batch_size=-1: "),
  "seed_below_0": (["--seed=-1"], "--seed=-1: "),
  "temperature_0": (["--temperature=0"], "--temperature=0: "),
  "top_p_0": (["--top_p=0"], "--top_p=0: "),
  "warmup_below_0": (["--warmup=-1"], "--warmup=-1: "),
  # Several flags together.
  "min_length": (["--min_length=9"], "--min_length must not be more than --ma"),
  "unfinished": (
    ["--unfinished_score=0", "--nostop_at_eos"],
    "--unfinished_score is for respons",
  ),
  "schedule": (["--schedule=cubic"], "--schedule=cubic: .*constant"),
  # Paths of other storage.
  "bucket": (["--workdir=no://b/run"], "--workdir=no://b/run: no:// is no buc"),
  "page": (["--policy=https://h/m"], "--policy=https://h/m: https:// is no bu"),
  "task_bucket": (
    ["--task_options=a=no://b"],
    "--task_options=no://b: no:// i",
  ),
  "code": (["--task=s3://b/t.py"], "--task=s3://b/t.py is not a path of this"),
  # What a script finds.
  "full_disk": (["--seed=9"], "rows.txt cannot be written: No space.*Free som"),
  "value_error": (["--seed=7"], "--seed=7 brings bad luck"),
  # No errors.
  "good": (["--steps=1", "--data=a~b"], None),
  "home": (["--data=~/rows.jsonl", "--compilation_cache=~"], None),
  "traceback": (["--seed=7", "--verbosity=1"], None),
  "own_error": (["--seed=8"], None),
  "help": (["--help"], None),
}


@functools.cache
def _outcomes():
  """What became of every case."""
  with tempfile.TemporaryDirectory() as folder:
    script = pathlib.Path(folder) / "script.py"
    script.write_text(SCRIPT)
    jobs = [
      {
        "kind": "run",
        "script": str(script),
        "words": words if name == "no_workdir" else ["--workdir=~/x", *words],
      }
      for name, (words, _) in CASES.items()
    ]
    return dict(zip(CASES, _forked(jobs), strict=True))


class RunTest(parameterized.TestCase):
  @parameterized.parameters(*(n for n, (_, error) in CASES.items() if error))
  def test_error_is_one_line(self, name):
    found = _outcomes()[name]
    self.assertEqual(found["status"], 1, found)
    self.assertEqual(found["err"].count("\n"), 1, found["err"])
    self.assertRegex(found["err"], f"^script.py: .*{CASES[name][1]}")
    self.assertEqual(found["out"], "")

  def test_errors_of_a_script_tell_of_the_traceback(self):
    self.assertEndsWith(
      _outcomes()["value_error"]["err"],
      "bad luck. (--verbosity=1 shows where.)\n",
    )
    shown = _outcomes()["traceback"]
    self.assertNotEqual(shown["status"], 0)
    self.assertIn("Traceback (most recent call last)", shown["err"])
    self.assertRegex(shown["err"], "ValueError: --seed=7 brings bad luck.\n")

  def test_other_errors_are_no_users_errors(self):
    found = _outcomes()["own_error"]
    self.assertNotEqual(found["status"], 0)
    self.assertIn("Traceback (most recent call last)", found["err"])
    self.assertIn("KeyError: 'seed'", found["err"])

  def test_status_is_what_main_returns(self):
    self.assertEqual(_outcomes()["good"]["status"], 3, _outcomes()["good"])

  def test_home_is_expanded_at_the_front_of_a_path(self):
    home = str(pathlib.Path.home())
    lines = _outcomes()["home"]["out"].splitlines()
    self.assertEqual(lines, [f"{home}/x", home, f"{home}/rows.jsonl"])
    lines = _outcomes()["good"]["out"].splitlines()
    self.assertEqual(lines, [f"{home}/x", f"{home}/.cache/rljax", "a~b"])

  @parameterized.parameters("reader", "disk")
  def test_a_run_does_not_end_with_its_terminal(self, which):
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    program = (
      "import sys\nfrom rljax.cli import terminal\n"
      "terminal.keep_printing()\n"
      "for i in range(3):\n  print('x' * 10**5, flush=True)\n"
      "print('last')\nopen(sys.argv[1], 'w').close()\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full:
      done = subprocess.run(
        [sys.executable, "-c", program, folder / "done"],
        cwd=conftest.REPOSITORY,
        stdout=writing if which == "reader" else full,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
      )
    os.close(writing)
    self.assertEqual((done.returncode, done.stderr), (0, ""))
    self.assertTrue((folder / "done").exists())

  def test_help_shows_the_script_and_its_flags(self):
    out = _outcomes()["help"]["out"]
    self.assertIn("A script that trains nothing.", out)
    for name in ("workdir", "learning_rate", "top_p", "discount"):
      self.assertIn(f"--{name}:", out.replace("--[no]", "--"))


# All scripts.


@functools.cache
def _flags_of_scripts():
  """Script -> name of flag -> its help, type and default."""
  jobs = [{"kind": "flags", "script": path} for path in SCRIPTS]
  found = {}
  for path, outcome in zip(SCRIPTS, _forked(jobs), strict=True):
    if outcome["status"]:
      raise AssertionError(f"{path}: {outcome['err']}")
    found[path] = json.loads(outcome["out"].splitlines()[-1])
  return found


def _text(flag):
  """Its help without the choices that absl puts in front."""
  return re.sub(r"^<.*?>: ", "", flag["help"], flags=re.S)


# Names that stand for several things, each of which its help tells.
SAME_NAMES = {
  "algorithm": "Every family of methods has its own.",
  "base": "A fit starts from it, or a reward model.",
  "batch_entropy_coef": "The example of pmap shows it, ppo.py has it.",
  "cache": "Of the reference's numbers, or of games that were played.",
  "clip_epsilon": "Bounds of ratios differ from paper to paper.",
  "data": "Logged replies are one file, samples may be several.",
  "epochs": "Passes over a step are whole, those over a corpus need not be.",
  "greedy": "The metrics of reasoning sample as well.",
  "labels": "What a step is worth, or a file that says it.",
  "max_per_prompt": "Of right solutions, or of either kind.",
  "max_sites": "A corpus shrinks large games, a picture leaves them out.",
  "normalizer": "Losses differ in what they can be averaged over.",
  "num_examples": "All that is learnt from, or what is mixed in.",
  "num_heads": "Of a model, or of a value head.",
  "num_rows": "Of a log, or of the data that are made.",
  "order": "Whether rewards rank replies differs from method to method.",
  "output": "A corpus or a page.",
  "ratio_guard": "The example of pmap cannot do without.",
  "reference": "Of a KL penalty, or of what evaluations compare with.",
  "seconds": "Of measuring a game, or of drawing it.",
  "threshold": "Of a step's value, or of a token's probability.",
  "workdir": "A run, or the example of pmap, which cannot be started again.",
}


# Texts that are no paths, and hold none.
NO_PATHS = {
  *("arm", "bad_tag", "good_tag", "k", "lora_targets", "mesh", "metrics"),
  *("new_vs", "split"),
  *("reward_template", "reward_terms", "reward_transform", "stop_strings"),
  *("run_name", "run_tags", "solution_column", "stop_tokens", "system_prompt"),
  *("template_options", "title", "wandb_project"),
}


class RematFlagTest(parameterized.TestCase):
  @parameterized.parameters(
    ((), "none"),
    (("--remat",), "nothing"),
    (("--remat=true",), "nothing"),
    (("--noremat",), "none"),
    (("--remat=dots",), "dots"),
  )
  def test_names_and_what_it_was(self, words, expected):
    values = flags.FlagValues()
    flags.DEFINE_flag(models.RematFlag("remat", "none", "Help."), values)
    values(["script", *words])
    self.assertEqual(values.remat, expected)
    # What a flagfile would hold of it is read as the same.
    again = flags.FlagValues()
    flags.DEFINE_flag(models.RematFlag("remat", "none", "Help."), again)
    again(["script", values["remat"].serialize()])
    self.assertEqual(again.remat, expected)

  def test_others_are_refused(self):
    values = flags.FlagValues()
    flags.DEFINE_flag(models.RematFlag("remat", "none", "Help."), values)
    with self.assertRaisesRegex(flags.IllegalFlagValueError, "nothing|dots"):
      values(["script", "--remat=dotty"])


class PathsTest(parameterized.TestCase):
  @parameterized.parameters(*SCRIPTS)
  def test_every_text_is_a_path_or_none(self, path):
    for name, flag in _flags_of_scripts()[path].items():
      if flag["type"] in ("ArgumentParser", "ListParser"):
        self.assertNotEqual(name in entry.PATHS, name in NO_PATHS, name)


class UnescapedTest(absltest.TestCase):
  def test_line_feeds(self):
    self.assertEqual(
      entry.unescaped([r"\n\nHuman:", "###"]), ["\n\nHuman:", "###"]
    )


class HelpTest(parameterized.TestCase):
  @parameterized.parameters(*SCRIPTS)
  def test_each_is_a_sentence(self, path):
    found = _flags_of_scripts()[path]
    self.assertIn("seed", found)
    for name, flag in found.items():
      with self.subTest(name):
        text = _text(flag)
        self.assertGreater(len(text), 20, text)
        self.assertEndsWith(text, ".")
        first = text[0]
        # Or a symbol such as λ, which has no capital of its own.
        self.assertTrue(first.isupper() or not first.isascii(), text)
        self.assertNotIn("\n", text)
        self.assertNotIn("  ", text)

  def test_one_name_has_one_meaning(self):
    """Where the help is the same, all is; where it is not, a table says why."""
    names = {}
    for path, found in _flags_of_scripts().items():
      for name, flag in found.items():
        names.setdefault(name, {})[path] = flag
    for name in names:
      if name in cli.SCRIPTS_CHOOSE:
        kinds = {flag["type"] for flag in names[name].values()}
        self.assertTrue(len(kinds) == 1 or name in SAME_NAMES, name)
        continue
      with self.subTest(name):
        meanings = {}
        for path, flag in names[name].items():
          settings = [flag["type"], flag["may_change"], flag["default"]]
          meaning = meanings.setdefault(flag["help"], {})
          meaning.setdefault(json.dumps(settings), []).append(path)
        if name not in SAME_NAMES:
          self.assertLen(meanings, 1, meanings)
        for settings in meanings.values():
          self.assertLen(settings, 1, settings)

  def test_names_that_differ_are_in_use(self):
    names = {name for found in _flags_of_scripts().values() for name in found}
    self.assertContainsSubset(cli.SCRIPTS_CHOOSE, names)
    self.assertContainsSubset(SAME_NAMES, names)
    for name in SAME_NAMES.keys() - cli.SCRIPTS_CHOOSE:
      helps = {
        found[name]["help"]
        for found in _flags_of_scripts().values()
        if name in found
      }
      self.assertGreater(len(helps), 1, name)


class TerminalTest(absltest.TestCase):
  def test_a_terminal_of_few_letters_is_not_lost(self):
    content = io.BytesIO()
    file = io.TextIOWrapper(content, encoding="latin-1", write_through=True)
    lasting = terminal.Lasting(file)
    for text in ("é🙂", "\ud800", "more"):
      print(text, file=lasting)
    self.assertEqual(
      content.getvalue().decode("latin-1"), "é\\U0001f642\n\\ud800\nmore\n"
    )


if __name__ == "__main__":
  absltest.main()

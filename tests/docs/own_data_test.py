"""The commands of docs/own_data.md, run with small numbers."""

import functools
import json
import os
import pathlib
import shutil

import transformers
from absl.testing import absltest

from rljax import compare, export
from tests import conftest, scripts
from tests.docs import markdown

PAGE = (markdown.ROOT / "docs" / "own_data.md").read_text()
# In place of SmolLM2: a model of a megabyte, which is given a chat template.
TEMPLATE = (
  "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant: {% endif %}"
)
SMALL = {
  "grpo": (
    *("--steps=2", "--max_length=6", "--num_samples=2", "--eval_every=1"),
    *("--num_eval_prompts=4", "--preflight=off"),
    # A model of this size is never right: what it writes must be worth more
    # than a value that has learnt nothing.
    "--rewards=my_rewards.py:right*0.2,my_rewards.py:short*0.8",
  ),
  "offline_value": ("--epochs=1", "--num_value_prompts=8", "--batch_size=4"),
  "offline": ("--steps=2", "--batch_size=4", "--num_dev_prompts=8"),
  "preference": ("--steps=2", "--batch_size=2", "--num_dev_prompts=8"),
}


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def _folder():
  """A folder with the page's two files, and the model."""
  folder = scripts.scratch()
  here = os.getcwd()
  os.chdir(folder)
  try:
    for block, _ in markdown.python_blocks(PAGE):
      if "prompts.jsonl" in block:
        exec(block, {})
      else:
        (folder / "my_rewards.py").write_text(block)
  finally:
    os.chdir(here)
  model = folder / "model"
  shutil.copytree(conftest.shared("data/models/stories260k"), model)
  tokenizer = transformers.AutoTokenizer.from_pretrained(model)
  tokenizer.chat_template = TEMPLATE
  tokenizer.save_pretrained(model)
  return folder


def _words(words):
  """The words of a command, with paths in the folder."""
  folder = _folder()
  for word in words:
    word = word.replace("smollm2-135m", str(folder / "model"))
    for name in ("runs/", "prompts.jsonl", "my_rewards.py", "exported"):
      word = word.replace(name, f"{folder}/{name}")
    yield word


class OwnDataTest(absltest.TestCase):
  def test_every_command(self):
    done = []
    for words in markdown.commands(PAGE):
      script = next((w for w in words if w.startswith("experiments/")), None)
      if script:
        given = list(_words(words[words.index(script) + 1 :]))
        workdir = next(w for w in given if w.startswith("--workdir="))
        given.remove(workdir)
        name = pathlib.Path(script).stem
        scripts.run(
          script, workdir.partition("=")[2], *given, *_words(SMALL[name])
        )
        done.append(name)
      elif "-m" in words and "rljax" in words[words.index("-m") + 1]:
        name, *given = _words(words[words.index("-m") + 1 :])
        module = {"rljax.compare": compare, "rljax.export": export}[name]
        self.assertEqual(module.main(given), 0)
        self.assertLen(done, len(SMALL))
    self.assertEqual(done, list(SMALL))
    rows = scripts.rows(_folder() / "runs/own", "samples.jsonl")
    gold = dict(
      (row["prompt"], row["answer"])
      for row in map(json.loads, (_folder() / "prompts.jsonl").open())
    )
    for row in rows:
      self.assertEqual(row["answer"], gold[row["prompt"]])
      self.assertIn("rewards/short/weighted", row["parts"])
    metrics = scripts.rows(_folder() / "runs/own")
    self.assertIn("task/rewards/right", metrics[0])
    self.assertIn("eval/is_correct", metrics[0])
    # What is exported says where it comes from, and loads elsewhere.
    exported = _folder() / "exported"
    card = (exported / "README.md").read_text()
    for text in ("prompts.jsonl", "my_rewards.py:right*0.2", "| eval/reward |"):
      self.assertIn(text, card)
    config = json.loads((exported / "generation_config.json").read_text())
    self.assertEqual(config["max_new_tokens"], 6)
    transformers.AutoConfig.from_pretrained(exported)


if __name__ == "__main__":
  absltest.main()

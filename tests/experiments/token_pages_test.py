"""The pages of tokens that PPO and offline RL leave, from tiny runs."""

import re

import numpy as np
from absl.testing import absltest

from rljax.distributed import meshes
from rljax.losses import offline
from rljax.models import hf
from rljax.scoring import cached
from rljax.tasks import word_lists
from rljax.text import encoding, files, logged
from tests import scripts

SFT = "experiments/sft.py"
PPO = "experiments/ppo.py"
OFFLINE = "experiments/offline.py"
TINY_PPO = (
  *scripts.SUMS,
  "--num_prompts=256",
  "--num_eval_prompts=16",
  "--batch_size=16",
  "--max_length=3",
  "--stop_at_eos",
  "--steps=4",
  "--eval_every=2",
  "--samples_every=1",
  "--learning_rate=3e-4",
  "--preflight=off",
  "--nowhiten_advantages",
  "--gae_lambda=1",
  # As the numbers below were found.
  "--warmup=0",
  "--max_grad_norm=0",
)
LOG = {"max_prompt_length": 16, "max_response_length": 16}
TINY_OFFLINE = (
  "--task=word_lists",
  "--task_options=num=32",
  *(f"--{name}={value}" for name, value in LOG.items()),
  "--num_dev_prompts=8",
  "--sample_batch_size=8",
  "--batch_size=8",
  # More replies than a pass takes.
  "--micro_batch_size=4",
  "--num_page_samples=10",
  "--steps=6",
  "--noscale_steps",
  "--eval_every=6",
  "--save_every=6",
  "--learning_rate=5e-3",
  # As the numbers below were found.
  "--schedule=constant",
  "--warmup=0",
)


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


def _page(workdir):
  """What the page of a run says: its head, and of each sample the numbers."""
  head, *articles = (workdir / "tokens.html").read_text().split("<article>")
  return head, [
    {
      "facts": dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", article)),
      "values": np.array(
        re.findall(r'title="\w+ (\S+), token \d+"', article), float
      ),
    }
    for article in articles
  ]


def _facts(samples, name):
  return np.array([float(s["facts"][name].replace("−", "-")) for s in samples])


class PPOTest(absltest.TestCase):
  def test_page_shows_the_advantages_that_are_learnt_from(self):
    policy = scripts.scratch() / "policy"
    scripts.run(
      SFT,
      policy,
      *scripts.LEARN_SUMS,
      "--num_eval_prompts=16",
      "--hidden_size=32",
      "--tokenizer=character",
      "--steps=60",
    )
    runs = {
      "without": ("--num_page_samples=0",),
      "with": ("--num_page_samples=16",),
    }
    workdirs = {name: scripts.scratch() / f"ppo-{name}" for name in runs}
    errors = scripts.drive(
      PPO,
      [
        (workdirs[name], *TINY_PPO, f"--policy={policy}", *flags)
        for name, flags in runs.items()
      ],
    )
    self.assertEqual(errors, [None] * len(runs))

    # A page changes nothing.
    self.assertFalse((workdirs["without"] / "tokens.html").exists())
    self.assertEqual(
      scripts.steady(scripts.rows(workdirs["with"])),
      scripts.steady(scripts.rows(workdirs["without"])),
    )
    self.assertEqual(
      scripts.fingerprint(workdirs["with"]),
      scripts.fingerprint(workdirs["without"]),
    )

    head, samples = _page(workdirs["with"])
    self.assertIn("<h1>arithmetic: a rollout after 3 steps</h1>", head)
    self.assertIn("16 of 16 shown", head)
    last = [
      row
      for row in scripts.rows(workdirs["with"], "samples.jsonl")
      if row["step"] == 3
    ]
    self.assertEqual(
      [len(s["values"]) for s in samples],
      [len(row["response_ids"]) for row in last],
    )
    self.assertGreater(len({len(s["values"]) for s in samples}), 1)
    np.testing.assert_allclose(
      _facts(samples, "reward"), [row["reward"] for row in last], atol=1e-3
    )
    self.assertEqual(
      [s["facts"]["truth"] for s in samples],
      [str(row["parts"]["truth"]) for row in last],
    )
    values = np.concatenate([s["values"] for s in samples])
    # A Monte-Carlo advantage is the reward of the row less the token's value.
    rewards = [[row["reward"]] * len(row["response_ids"]) for row in last]
    mean_value = scripts.rows(workdirs["with"])[3]["values/mean"]
    np.testing.assert_allclose(
      values.mean(), np.concatenate(rewards).mean() - mean_value, atol=1e-5
    )
    self.assertGreater(abs(mean_value), 1e-3)


class OfflineTest(absltest.TestCase):
  def test_page_shows_what_multiplies_the_gradient(self):
    policy = scripts.scratch() / "reference"
    scripts.run(
      SFT,
      policy,
      "--task=word_lists",
      "--num_examples=500",
      "--num_eval_prompts=16",
      "--hidden_size=32",
      "--max_positions=32",
      "--steps=30",
      "--learning_rate=5e-3",
    )
    path = scripts.scratch() / "valued.jsonl"
    rows = word_lists.logged("train", 0, num=32)
    rows = [{**row, "value": 0.4} for row in rows]
    files.write_jsonl(path, rows)
    kl_coefs = {"a_lol_kl": 0.05}
    workdirs = {
      algorithm: scripts.scratch() / f"offline-{algorithm}"
      for algorithm in ("a_lol", "a_lol_kl", "r_gold")
    }
    flags = (*TINY_OFFLINE, f"--policy={policy}", f"--data={path}")
    errors = scripts.drive(
      OFFLINE,
      [
        (
          workdir,
          *flags,
          f"--algorithm={name}",
          f"--kl_coef={kl_coefs.get(name, 0)}",
        )
        for name, workdir in workdirs.items()
      ],
    )
    self.assertEqual(errors, [None] * len(workdirs))

    loaded = hf.load(policy)
    encoded = encoding.prepare(
      loaded.tokenizer,
      logged.load(str(path))[0],
      **LOG,
      too_long="skip",
      prompt_format="plain",
    )
    log_probs = {
      name: _log_probs(workdir, encoded)
      for name, workdir in {"": policy, **workdirs}.items()
    }
    rewards = np.array([row["rewards"] for row in rows], np.float32)[:, 0]
    mask = log_probs[""] < 0
    for name, workdir in workdirs.items():
      with self.subTest(name):
        head, samples = _page(workdir)
        self.assertIn(f"<h1>{name}: logged replies after 6 updates", head)
        self.assertRegex(head, r"10 of \d+ shown")
        self.assertLen(samples, 10)
        shown = [int(s["facts"]["row"].split(":")[-1]) - 1 for s in samples]
        self.assertLen(set(shown), 10)
        self.assertGreater(max(shown) - min(shown), 16)
        np.testing.assert_allclose(
          _facts(samples, "reward"), rewards[shown], atol=1e-3
        )
        # From the definition, with the parameters that the run ended with.
        expected = offline.token_weights(
          name,
          log_probs[name],
          log_probs[""],
          rewards,
          rewards - np.float32(0.4),
          mask,
        )
        expected = np.asarray(expected) - kl_coefs.get(name, 0)
        for sample, row in zip(samples, shown, strict=True):
          np.testing.assert_allclose(
            sample["values"], expected[row][mask[row]], rtol=1e-4, atol=1e-6
          )
        # Training has moved what depends on the policy.
        if name == "a_lol":
          plain = rewards[shown] - 0.4
          firsts = [s["values"][0] for s in samples]
          self.assertGreater(np.abs(firsts - plain).max(), 1e-3)


def _log_probs(workdir, encoded):
  """Of the first replies, under the parameters of a run, `[N, T]`."""
  loaded, mesh = hf.load(workdir), meshes.make()
  return cached.response_log_probs(
    loaded.model,
    meshes.replicate(loaded.params, mesh),
    encoded,
    batch_size=16,
    mesh=mesh,
  )[:, 0]


if __name__ == "__main__":
  absltest.main()

"""Flags of scores, reward terms, rewrites and KL penalties."""

from collections.abc import Sequence
from typing import Any

from absl import flags

from rljax.cli import entry
from rljax.models import hf
from rljax.rlmec import prompts as rewriting
from rljax.scoring import kept, reward_terms, scorers
from rljax.text import keywords, steps

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()


def define_rewards() -> None:
  """Defines reward functions of the user's own, in place of the task's score.

  `define_task` does so where responses are scored.
  """
  flags.DEFINE_float(
    "score_seconds",
    120.0,
    "Seconds that scoring a response by --task may take, and a batch that is "
    "scored at once that many times its responses; 0: no limit.",
    lower_bound=0.0,
  )
  entry.may_change("score_seconds")
  flags.DEFINE_list(
    "rewards",
    [],
    "Functions whose sum scores a response, separated by commas: "
    "file.py:function or module:function, each with a weight behind it or "
    "none, such as my_rewards.py:length*0.5; docs/own_data.md says what they "
    "are given. Empty: the score of --task.",
  )
  flags.DEFINE_float(
    "reward_timeout",
    60.0,
    "Seconds that a call of a function of --rewards may take.",
    lower_bound=0.01,
  )
  flags.DEFINE_integer(
    "reward_batch_size",
    256,
    "Responses that a function of --rewards is given at a time.",
    lower_bound=1,
  )
  flags.DEFINE_integer(
    "reward_workers",
    1,
    "Processes that call each function of --rewards.",
    lower_bound=1,
  )
  flags.DEFINE_float(
    "right_at",
    None,
    "Least reward of a response that counts as right, for --rewards whose "
    "functions do not return the part is_correct; unset: nobody says it.",
  )
  flags.DEFINE_bool(
    "skip_unscored",
    False,
    "Whether a response for which a function of --rewards fails or takes too "
    "long is left out and counted, as one that gets None; false stops there.",
  )
  entry.may_change("reward_timeout", "reward_batch_size", "reward_workers")
  entry.require(
    ["rewards", "score_options"],
    lambda v: not (v["rewards"] and v["score_options"]),
    "--score_options belongs to a task's score, which --rewards replaces.",
  )
  entry.require(
    ["rewards", "right_at"],
    lambda v: v["rewards"] or v["right_at"] is None,
    "--right_at says which rewards of --rewards are right: give those.",
  )


def task_scorer(
  values: flags.FlagValues, task: Any, mesh: Any = None
) -> scorers.Scorer:
  """Returns what scores responses: --rewards, or the task's own score.

  Where there is neither, and a reward model is a term of the reward, it is what
  the logs show as the score.

  Args:
    values: parsed flags.
    task: what --task names, or None.
    mesh: from `meshes.make`, for a reward model.

  Raises:
    ValueError: if an option does not fit, or a function is not named well.
  """
  if values.rewards:
    return scorers.of_functions(
      values.rewards,
      timeout=values.reward_timeout,
      batch_size=values.reward_batch_size,
      num_workers=values.reward_workers,
      skip_unscored=values.skip_unscored,
      right_at=values.right_at,
    )
  if task is None and "reward_terms" in values:
    # The term asks it of the same responses again.
    return scorers.once(
      load_reward_model(values, mesh, batch_size=values.batch_size)
    )
  return scorers.of_task(task, values.score_options, values.score_seconds)


def define_reward_model(text: str = "") -> None:
  """Defines a classifier that scores responses.

  Args:
    text: what it does in the script, as a sentence.
  """
  flags.DEFINE_string(
    "reward_model",
    "",
    (text or "Classifier whose reward replaces the task's score.")
    + " A workdir of outcome_reward_model.py, a Hugging Face directory or a "
    "hub name; empty for none.",
  )
  flags.DEFINE_string(
    "reward_transform",
    "sigmoid",
    "What the reward model's logit becomes: sigmoid or raw; for several labels "
    "softmax:<label>, sigmoid:<label> or raw:<label>.",
  )
  flags.DEFINE_string(
    "reward_template",
    "{prompt}{response}",
    'Text that the reward model reads, with {prompt} and {response}; "pair" '
    "for encoders that read two texts.",
  )
  flags.DEFINE_integer(
    "reward_length",
    512,
    "Most tokens that the reward model reads; longer texts lose their "
    "beginning.",
    lower_bound=1,
  )


def reward_model_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `reward_models.RewardModel`."""
  return {
    "transform": values.reward_transform,
    "template": values.reward_template,
    "max_length": values.reward_length,
  }


def load_reward_model(
  values: flags.FlagValues,
  mesh: Any,
  *,
  batch_size: int,
  name: str = "reward_model",
) -> scorers.Scorer | None:
  """Loads a reward model as a scorer beside the task's; None if none is named.

  Args:
    values: parsed flags.
    mesh: from `meshes.make`.
    batch_size: texts at the same time.
    name: of the flag that names it; it is read as the flags --reward_* say.
  """
  if not values[name].value:
    return None
  return scorers.scorer(
    "",
    {},
    values[name].value,
    **reward_model_options(values),
    batch_size=batch_size,
    mesh=mesh,
  )


def load_scorer(
  values: flags.FlagValues, mesh: Any, *, batch_size: int
) -> scorers.Scorer:
  """Returns what scores responses: --rewards, --reward_model or --task.

  In scripts without checkpoints it keeps what it was told; see `kept.scorer`.

  Args:
    values: parsed flags.
    mesh: from `meshes.make`.
    batch_size: texts at the same time, for a reward model.

  Raises:
    ValueError: if none is named, or an option does not fit.
  """
  if values.rewards:
    if values.reward_model:
      raise ValueError(
        "--rewards and --reward_model both score the responses: give one."
      )
    return _kept(values, task_scorer(values, None))
  score = scorers.scorer(
    values.task,
    keywords.parse(values.score_options),
    values.reward_model,
    seconds=values.score_seconds,
    **reward_model_options(values),
    batch_size=batch_size,
    mesh=mesh,
  )
  return _kept(values, score)


def _kept(values, score):
  """Lets scripts without checkpoints keep what a scorer has told them."""
  if "save_every" in values:
    return score
  return kept.scorer(score, values.workdir)


def define_reward_terms() -> None:
  """Defines the sum of rewards that a response earns."""
  flags.DEFINE_list(
    "reward_terms",
    ["score"],
    "Terms whose sum is the reward: score (of the task, on the last token), "
    "steps (--step_reward for each line that matches the reference), "
    "reward_model (on the last token), dense_reward_model (by how much each "
    "line changes what --reward_model expects).",
  )
  flags.DEFINE_float(
    "step_reward",
    0.1,
    "Reward of a line that matches, for the reward term steps.",
  )
  flags.DEFINE_float(
    "step_reward_limit",
    0.5,
    "Most that the lines of a response earn, for the reward term steps.",
  )
  flags.DEFINE_bool(
    "whiten_rewards",
    False,
    "Whether rewards, KL penalties among them, are divided by their standard "
    "deviation over the tokens of a step; their mean stays.",
  )
  flags.DEFINE_float(
    "step_coef", 1.0, "Scale of the reward term dense_reward_model."
  )
  define_reward_model(
    "Classifier for the reward terms reward_model and dense_reward_model."
  )


def load_reward_terms(
  values: flags.FlagValues,
  loaded: hf.LanguageModel,
  mesh: Any,
  score: scorers.Scorer,
  **options: Any,
) -> reward_terms.Terms:
  """Loads --reward_terms; see `reward_terms.load` for the options.

  Args:
    values: parsed flags.
    loaded: the policy.
    mesh: from `meshes.make`.
    score: of `task_scorer`.
    **options: of `reward_terms.load`.

  Raises:
    ValueError: if the terms do not fit each other, their reward model or
      --unfinished_score.
  """
  if "score" in values.reward_terms and not (values.task or values.rewards):
    raise ValueError(
      "--reward_terms=score is the score of --task or of --rewards: give one, "
      "or other terms."
    )
  if values.unfinished_score and "score" not in values.reward_terms:
    raise ValueError(
      f"--unfinished_score={values.unfinished_score} stands in for the score, "
      "which is none of the --reward_terms: give 0, or the term."
    )
  return reward_terms.load(
    loaded,
    names=values.reward_terms,
    mesh=mesh,
    batch_size=values.batch_size,
    dtype=values.dtype,
    step_reward=values.step_reward,
    step_reward_limit=values.step_reward_limit,
    step_coef=values.step_coef,
    unfinished_earns=values.unfinished_score is None,
    reward_model=values.reward_model,
    # Where nothing else scores responses, that is the model itself.
    model_score=None if values.task or values.rewards else score,
    **reward_model_options(values),
    **options,
  )


def define_reasoning() -> None:
  """Defines how several samples of a question are judged."""
  flags.DEFINE_list(
    "k",
    [],
    "Numbers k of samples for pass@k, separated by commas; empty: "
    "--num_samples alone.",
  )
  flags.DEFINE_enum(
    "ties",
    "expected",
    ["expected", "first_seen"],
    "Which answer wins a tied vote: expected is one at random, on average; "
    "first_seen is the first.",
  )
  flags.DEFINE_enum(
    "trace_key",
    "text",
    sorted(steps.KEYS),
    "What makes two reasoning traces the same: their text, or their equations.",
  )
  flags.DEFINE_string(
    "rerank_model",
    "",
    "Classifier that ranks the samples of a question, in the forms of "
    "--reward_model and read as the flags --reward_* say; empty for none.",
  )
  flags.DEFINE_string(
    "new_vs",
    "",
    "Label of the policy whose samples make a trace of others known; empty for "
    "none.",
  )
  flags.DEFINE_string(
    "new_vs_samples",
    "",
    "File whose samples make a trace known, at least 4 times --num_samples of "
    "each prompt; empty for none.",
  )
  entry.require(
    ["k", "num_samples"],
    lambda v: all(
      k.isdecimal() and 1 <= int(k) <= v["num_samples"] for k in v["k"]
    ),
    "--k must be whole numbers from 1 to --num_samples.",
  )
  entry.require(
    ["new_vs", "new_vs_samples"],
    lambda v: not (v["new_vs"] and v["new_vs_samples"]),
    "Give --new_vs or --new_vs_samples, not both.",
  )


def define_rewriting(
  template: str, *, locate: bool | None, teacher: bool = False
) -> None:
  """Defines how a generative reward model is asked for rewrites.

  Args:
    template: default of --template; "": as the model was trained.
    locate: default of --locate; None: likewise.
    teacher: whether a teacher is asked, too.
  """
  if teacher:
    flags.DEFINE_float(
      "teacher_seconds",
      600.0,
      "Seconds that a rewrite by --teacher may take, if that is a function; 0: "
      "no limit.",
      lower_bound=0.0,
    )
    entry.may_change("teacher_seconds")
  flags.DEFINE_string(
    "stages",
    "",
    "Folder of the stages before training, which several runs may share; empty "
    "takes --workdir.",
  )
  entry.may_change("stages")
  flags.DEFINE_enum(
    "template",
    template,
    [*([] if template else [""]), *sorted(rewriting.TEMPLATES)],
    "How the reward model is asked: compact for a model of characters, lines "
    "for a vocabulary without letters, instruction for a model of words"
    + ("." if template else "; empty: as it was trained."),
  )
  flags.DEFINE_bool(
    "locate",
    locate,
    "Whether the reward model names the first wrong step, so that its rewrite "
    "keeps the steps before that one"
    + ("." if locate is not None else "; unset: as it was trained."),
  )
  flags.DEFINE_integer(
    "max_question_length",
    2000,
    "Most tokens of a question to a model that rewrites, the wrong solution "
    "included; longer ones are left out.",
    lower_bound=1,
  )


def define_pairwise() -> None:
  """Defines the margins and the centre of a loss of comparisons."""
  for name, text in (
    ("margin", "Score by which the better of two replies is to lead; 0: none."),
    (
      "reward_margin",
      "Further score by which it is to lead, for each unit of the difference "
      "of the replies' rewards; 0: none.",
    ),
    (
      "center_coef",
      "Weight of the squared sum of the two scores, which draws them to a mean "
      "of 0, such as 0.01; 0: the loss leaves their level open.",
    ),
  ):
    flags.DEFINE_float(name, 0.0, f"{text} For --loss=pairwise.", 0)


def pairwise_options(values: flags.FlagValues) -> dict[str, float]:
  """Returns keyword arguments of `supervised.pairwise_loss`."""
  names = ("margin", "reward_margin", "center_coef")
  return {name: values[name].value for name in names}


def define_kl(
  kl: str,
  choices: Sequence[str],
  text: str,
  *,
  kl_coef: float,
  estimator: str = "k1",
) -> None:
  """Defines a KL penalty.

  Args:
    kl: default of --kl.
    choices: of --kl.
    text: help of --kl.
    kl_coef: default of --kl_coef.
    estimator: default of --kl_estimator; "" where --kl decides.
  """
  flags.DEFINE_enum(
    "kl_estimator",
    estimator,
    [*([] if estimator else [""]), "k1", "k2", "k3"],
    "Estimator of the KL divergence; see ops/log_probs.py."
    + ("" if estimator else " Empty: k3 in the loss, else k1."),
  )
  flags.DEFINE_enum("kl", kl, choices, text)
  flags.DEFINE_float(
    "kl_coef",
    kl_coef,
    "Weight β of the KL penalty; the first one, if it adapts.",
    lower_bound=0.0,
  )
  flags.DEFINE_string(
    "reference",
    "",
    "Model that the KL penalty compares the policy with, in the forms of "
    "--policy; empty: the policy before its first update.",
  )
  if not estimator:
    entry.require(
      ["kl", "kl_estimator"],
      lambda v: (v["kl"], v["kl_estimator"]) != ("loss", "k1"),
      "--kl_estimator=k1 has a gradient of mean 0 as a loss; take k2 or k3, or "
      "--kl=reward.",
    )
    entry.require(
      ["kl", "reference"],
      lambda v: v["kl"] != "none" or not v["reference"],
      "--reference has no meaning for --kl=none.",
    )


def define_adaptive_kl() -> None:
  """Defines a controller of the KL coefficient."""
  flags.DEFINE_float(
    "kl_target",
    0.0,
    "KL divergence of a response, in nats, to which the KL coefficient adapts; "
    "0 keeps --kl_coef.",
    lower_bound=0.0,
  )
  flags.DEFINE_float(
    "kl_horizon",
    10_000.0,
    "Responses over which the KL coefficient adapts.",
    lower_bound=1.0,
  )

import dataclasses
import gzip
import json
import logging
import math
import pathlib
import subprocess
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from absl.testing import parameterized

from rljax.generation import responses, rollouts
from rljax.models import hf
from rljax.tasks import arithmetic, word_lists
from rljax.text import (
  chats,
  dialogues,
  encoding,
  files,
  forms,
  logged,
  tokens,
  vocabularies,
)
from tests import conftest

WORDS = arithmetic.word_tokenizer()
TRANSCRIPT = (
  "\n\nHuman: one\n\ntwo\n\nAssistant: three\n\nHuman: four\n\nAssistant:"
)
ASKED = {"role": "user", "content": "1+2="}
TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]"
  "{{ message['content'] }}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def _bytes(chat_template=TEMPLATE):
  """Bytes as tokens; a start token is put in front of every text."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  words = ["<|start|>", "<|end|>", *letters]
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [])
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|start|> $A", special_tokens=[("<|start|>", 0)]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>"
  )
  tokenizer.chat_template = chat_template
  return tokenizer


BYTES = _bytes()


def _row(prompt="1+2=", candidates=("3",), rewards=None, **fields):
  values = {"value": None, "advantage": None, "response_ids": None}
  return forms.Row(
    prompt=prompt,
    candidates=tuple(candidates),
    rewards=rewards,
    **(values | {"place": "here"} | fields),
  )


def _said(content):
  return {"role": "assistant", "content": content}


class ParseTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("reply", {"response": "3"}, ("3",), None),
    ("scored", {"response": " 3\n", "reward": 1}, (" 3\n",), (1.0,)),
    ("null", {"response": "3", "value": None, "chosen": None}, ("3",), None),
    (
      "ranked",
      {"candidates": ["3", "4"], "rewards": [1, -0.5]},
      ("3", "4"),
      (1.0, -0.5),
    ),
    ("one", {"candidates": ["3"], "rewards": [0]}, ("3",), (0.0,)),
    ("texts", {"chosen": "3", "rejected": "4"}, ("3", "4"), None),
    (
      "messages",
      {"chosen": [_said("3")], "rejected": [_said("4")]},
      ("3", "4"),
      None,
    ),
    (
      "scored_pair",
      {
        "chosen": "3",
        "rejected": "4",
        "score_chosen": 2,
        "score_rejected": 1.5,
      },
      ("3", "4"),
      (2.0, 1.5),
    ),
  )
  def test_forms(self, fields, candidates, rewards):
    for prompt in ("1+2=", [{"name": "x", **ASKED}]):
      row = forms.parse({"prompt": prompt, "other": 1, **fields}, "here")
      expected = prompt if isinstance(prompt, str) else (ASKED,)
      self.assertEqual(row, _row(expected, candidates, rewards))

  def test_value_and_advantage(self):
    row = {"prompt": "1+2=", "response": "3", "reward": 1}
    row |= {"value": 0.75, "advantage": 0.25}
    self.assertEqual(
      forms.parse(row, "here"),
      _row(rewards=(1.0,), value=0.75, advantage=0.25),
    )

  def test_texts_that_repeat_the_prompt(self):
    row = forms.parse(
      {"prompt": "1+2=", "chosen": "1+2= 3", "rejected": "1+2= 4"}, "here"
    )
    self.assertEqual(row.candidates, (" 3", " 4"))
    # One that merely begins like it is a reply.
    row = forms.parse(
      {"prompt": "1+2=", "chosen": "1+2=3", "rejected": "4"}, "here"
    )
    self.assertEqual(row.candidates, ("1+2=3", "4"))

  @parameterized.parameters(("1+2=",), ([ASKED],), (None,))
  def test_messages_that_repeat_the_prompt(self, prompt):
    row = {"prompt": prompt}
    row |= {"chosen": [ASKED, _said("3")], "rejected": [ASKED, _said("4")]}
    self.assertEqual(forms.parse(row, "here"), _row((ASKED,), ("3", "4")))

  def test_transcripts(self):
    replies = (" a\n\nb: c\n\n\nd", " e\n")
    row = {
      "chosen": TRANSCRIPT + replies[0],
      "rejected": TRANSCRIPT + replies[1],
    }
    self.assertEqual(forms.parse(row, "here"), _row(TRANSCRIPT, replies))

  def test_rollout_records(self):
    ids = jnp.array([[3, 104, 0], [4, 1, 2]])
    mask = jnp.array([[True, True, False], [True, True, True]])
    prompts = jnp.ones((2, 4), jnp.int32)
    records = responses.Samples(
      rollout=rollouts.Rollout(
        prompt_ids=prompts,
        prompt_mask=prompts == 1,
        response_ids=ids,
        response_mask=mask,
        log_probs=jnp.zeros((2, 3)),
        truncated_log_probs=jnp.zeros((2, 3)),
        finished=mask[:, 2],
      ),
      prompts=["1+2=", "2+2="],
      texts=["3", "412"],
      scores=[1.0, 0.0],
      parts=[{"answer": 3}, {}],
      settings=responses.Settings(max_length=3),
      policy_step=7,
      tokenizer=WORDS,
    ).records()
    rows = [forms.parse(json.loads(json.dumps(r)), "here") for r in records]
    self.assertEqual(
      rows,
      [
        _row(rewards=(1.0,), response_ids=(3, 104), finished=(False,)),
        _row("2+2=", ("412",), (0.0,), response_ids=(4, 1, 2)),
      ],
    )

  @parameterized.parameters(
    ({}, 'it has none of "response", "candidates" and "chosen"'),
    ({"prompt": "a"}, 'none of "response"'),
    ({"prompt": "a", "response": None}, 'none of "response"'),
    ({"response": "b"}, '"prompt" is missing'),
    ({"prompt": "a", "candidates": ["b"]}, '"rewards" is missing'),
    ({"prompt": "a", "chosen": "b"}, '"rejected" is missing'),
    ({"rejected": TRANSCRIPT + "b"}, '"chosen" is missing'),
    ({"prompt": "a", "response": " \n"}, '"response" is empty'),
    (
      {"prompt": "a", "candidates": ["b", ""], "rewards": [1, 2]},
      r'"candidates\[1\]" is empty',
    ),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, '"rejected" is empty'),
    ({"prompt": " ", "response": "b"}, '"prompt" is empty'),
    ({"prompt": [], "response": "b"}, '"prompt" is empty'),
    ({"prompt": 5, "response": "b"}, '"prompt" must be a text or mess.*int'),
    ({"prompt": ["a"], "response": "b"}, 'message of "prompt" is not an obj'),
    ({"prompt": [{"role": "user"}], "response": "b"}, '"content" of a message'),
    ({"prompt": "a", "response": ["b"]}, '"response" must be a text, got list'),
    ({"prompt": "a\ud800", "response": "b"}, '"prompt" holds half a surr'),
    (
      {"prompt": "a", "candidates": ["b", 5], "rewards": [1, 2]},
      r'"candidates\[1\]" must be a text, got int',
    ),
    (
      {"prompt": "a", "candidates": ["b"], "rewards": [1, 2]},
      "there are 1 candidates, but 2 rewards",
    ),
    (
      {"prompt": "a", "candidates": [], "rewards": []},
      "a list that is not empty",
    ),
    ({"prompt": "a", "candidates": "b", "rewards": [1]}, "must be a list"),
    (
      {"prompt": "a", "candidates": ["b"], "rewards": [math.inf]},
      r'"rewards\[0\]" must be a finite number, got inf',
    ),
    (
      {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 1},
      '"rejected_score" is missing',
    ),
    (
      {"prompt": "a", "response": "b", "response_ids": [1, True]},
      '"response_ids" must be a list of ids',
    ),
  )
  def test_unusable(self, row, message):
    with self.assertRaisesRegex(ValueError, f"^rows.jsonl:17: .*{message}"):
      forms.parse(row, "rows.jsonl:17")

  @parameterized.product(
    name=("reward", "value", "advantage"),
    value=(True, math.nan, -math.inf, "1.0", [1], 10**400),
  )
  def test_no_finite_number(self, name, value):
    row = {"prompt": "a", "response": "b", name: value}
    with self.assertRaisesRegex(ValueError, f'^x: "{name}" must be a finite'):
      forms.parse(row, "x")

  def test_lost_reward(self):
    with self.assertRaisesRegex(ValueError, "a finite number, got None"):
      forms.parse({"prompt": "a", "response": "b", "reward": None}, "x")

  @parameterized.parameters(
    (TRANSCRIPT + " a", TRANSCRIPT + " ", '"rejected" is empty'),
    ("\n\nHuman: b" + TRANSCRIPT, TRANSCRIPT, "differ before the last reply"),
    ("one", "two", r'"chosen" has no "\\n\\nAssistant:" after'),
    ("\n\nAssistant: a", "\n\nAssistant: b", '"chosen" has no'),
    (TRANSCRIPT + " a\n\nHuman: b", TRANSCRIPT, "does not end in a reply"),
    ([ASKED], [ASKED, _said("3")], "does not end in a reply of the assistant"),
    ([_said("3")], [_said("4")], '"prompt" is empty'),
    ([ASKED, _said("3")], [ASKED, ASKED, _said("3")], "differ before"),
    ([ASKED, _said("")], [ASKED, _said("3")], '"chosen" is empty'),
  )
  def test_unusable_transcripts(self, chosen, rejected, message):
    with self.assertRaisesRegex(ValueError, message):
      forms.parse({"chosen": chosen, "rejected": rejected}, "x")

  def test_another_prompt(self):
    row = {"prompt": "2+2=", "chosen": [ASKED, _said("3")], "rejected": "4"}
    with self.assertRaisesRegex(
      ValueError, '"chosen" does not continue the pr'
    ):
      forms.parse(row, "x")


class TurnsTest(parameterized.TestCase):
  def test_turns(self):
    expected = [
      {"role": "user", "content": "one\n\ntwo"},
      {"role": "assistant", "content": "three"},
      {"role": "user", "content": "four"},
    ]
    self.assertEqual(dialogues.turns(TRANSCRIPT), expected)
    self.assertEqual(dialogues.turns(TRANSCRIPT.strip()), expected)
    self.assertEqual(
      dialogues.turns(TRANSCRIPT + " five: six"),
      [*expected, _said("five: six")],
    )

  @parameterized.parameters(
    ("one", 'begins with "'),
    ("one\n\nHuman: two", 'begins with "'),
    ("\n\nAssistant:", "no turns"),
  )
  def test_bad_transcripts(self, transcript, message):
    with self.assertRaisesRegex(ValueError, message):
      dialogues.turns(transcript)


class LoadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self._temporary = tempfile.TemporaryDirectory()
    self.addCleanup(self._temporary.cleanup)
    self.folder = pathlib.Path(self._temporary.name)

  def _write(self, lines, name="train.jsonl"):
    content = b"\n".join(
      line if isinstance(line, bytes) else json.dumps(line).encode()
      for line in lines
    )
    if name.endswith(".gz"):
      content = gzip.compress(content)
    (self.folder / name).write_bytes(content)

  @parameterized.parameters("train.jsonl", "train.jsonl.gz")
  def test_places(self, name):
    good = {"prompt": "a", "response": "b", "reward": 1}
    lines = [good, b"", b"{", good | {"reward": "1"}, b"[1]", good]
    self._write(lines, name)
    path = self.folder / name
    for source in (name, "{split}" + name.removeprefix("train"), "."):
      with self.assertLogs("absl", logging.WARNING) as logs:
        rows, skipped, _ = logged.load(source, data_dir=self.folder)
      self.assertEqual([r.place for r in rows], [f"{path}:1", f"{path}:6"])
      self.assertLen(skipped, 3)
      for message, start in zip(
        skipped,
        (":3: not JSON", ':4: "reward" must be a f', ":5: expected a JSON obj"),
        strict=True,
      ):
        self.assertStartsWith(message, f"{path}{start}")
      self.assertIn(f"3 of 5 rows of {source} cannot be used", logs.output[0])
      for message in skipped:
        self.assertIn(message, logs.output[0])

  def test_list(self):
    good = {"prompt": "a", "response": "b"}
    (self.folder / "dev.json").write_text(json.dumps([good, 1, {}]))
    rows, skipped, _ = logged.load("dev.json", data_dir=self.folder)
    self.assertEndsWith(rows[0].place, "dev.json, row 0")
    self.assertIn("dev.json, row 1: expected a JSON object", skipped[0])
    self.assertIn("dev.json, row 2: it has none of", skipped[1])

  def test_nothing_left(self):
    self._write([{"prompt": "a"}, b"{", {"prompt": "", "response": "b"}, {}])
    with self.assertRaisesRegex(
      ValueError,
      "No row is left: 4 of 4 .*:1: it has none .*:2: not JSON.*:3: .*empty",
    ) as caught:
      logged.load("train.jsonl", data_dir=self.folder)
    self.assertNotIn(":4:", str(caught.exception))
    self._write([])
    with self.assertRaisesRegex(ValueError, "no rows"):
      logged.load("train.jsonl", data_dir=self.folder)

  def test_prompts(self):
    pair = {"chosen": TRANSCRIPT + " a", "rejected": TRANSCRIPT + " b"}
    lines = [{"prompt": "a"}, pair, {"prompt": ""}, b"{", {"response": "b"}]
    self._write([*lines, {"prompt": [ASKED], "response": "", "reward": "x"}])
    rows, skipped, _ = logged.load_prompts("train.jsonl", data_dir=self.folder)
    path = self.folder / "train.jsonl"
    self.assertEqual(
      rows,
      [
        dataclasses.replace(
          _row(prompt, (), place=f"{path}:{number}"), columns=columns
        )
        for number, prompt, columns in (
          (1, "a", {}),
          (2, TRANSCRIPT, pair),
          (6, (ASKED,), {"response": "", "reward": "x"}),
        )
      ],
    )
    self.assertLen(skipped, 3)
    self.assertEqual(skipped[0], f'{path}:3: "prompt" is empty.')
    self._write([{}])
    with self.assertRaisesRegex(
      ValueError, "No row is left: 1 of 1 prompts of"
    ):
      logged.load_prompts("train.jsonl", data_dir=self.folder)

  def test_tfds(self):
    tfds = pytest.importorskip("tensorflow_datasets")

    with tfds.core.registered.skip_registration():

      class Logged(tfds.core.GeneratorBasedBuilder):
        name = "rljax_logged"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
          text = tfds.features.Text()
          return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
              {"prompt": text, "response": text, "reward": np.float32}
            )
          )

        def _split_generators(self, dl_manager):
          return {"train": self._generate_examples()}

        def _generate_examples(self):
          for i, response in enumerate(("né", "", b"\xff")):
            yield i, {"prompt": "a", "response": response, "reward": i + 0.5}

    folder = str(self.folder)
    Logged(data_dir=folder, file_format="array_record").download_and_prepare()
    rows, skipped, _ = logged.load("tfds:rljax_logged", data_dir=folder)
    (row,) = rows
    self.assertRegex(row.place, r"^tfds:rljax_logged, row \d$")
    self.assertEqual(row, _row("a", ("né",), (0.5,), place=row.place))
    self.assertRegex(
      " ".join(sorted(skipped, key=len)),
      r'row \d: "response" is empty\..*row \d: not UTF-8',
    )

  @parameterized.parameters(("train", 1751), ("dev", 241), ("heldout", 311))
  def test_original_transcripts(self, split, num_rows):
    name = str(
      conftest.shared("data/hh_rlhf") / "harmless_base_{split}.jsonl.gz"
    )
    rows, skipped, _ = logged.load(name, split)
    self.assertEqual((len(rows), skipped), (num_rows, []))
    # Counted, not compared by assertEqual: the texts are not for logs.
    transcripts = files.load_rows(name, split)
    num_whole = sum(
      row.prompt + reply == transcript[side]
      for row, transcript in zip(rows, transcripts, strict=True)
      for side, reply in zip(
        ("chosen", "rejected"), row.candidates, strict=True
      )
    )
    self.assertEqual(num_whole, 2 * num_rows)
    self.assertTrue(all(row.prompt.endswith("\n\nAssistant:") for row in rows))
    self.assertFalse(any("\n\nHuman:" in c for r in rows for c in r.candidates))
    self.assertTrue(any("\n\n" in row.candidates[0] for row in rows))
    # A prompt holds all its turns, and the user's is the last.
    num_turns = [row.prompt.count("\n\nHuman:") for row in rows]
    found = [dialogues.turns(row.prompt) for row in rows]
    self.assertEqual(
      num_turns, [sum(m["role"] == "user" for m in turns) for turns in found]
    )
    self.assertEqual({turns[-1]["role"] for turns in found}, {"user"})


class RenderTest(parameterized.TestCase):
  def test_plain(self):
    rows = [_row(TRANSCRIPT, (" a ",))]
    self.assertEqual(chats.render(rows, None, "plain"), (rows, []))
    with self.assertRaisesRegex(ValueError, "here: .*--prompt_format=chat"):
      chats.render([_row((ASKED,))], None, "plain")

  @parameterized.parameters(
    ((ASKED,), "<|start|>[user]1+2=[assistant]"),
    ("1+2=", "<|start|>[user]1+2=[assistant]"),
    (
      TRANSCRIPT,
      "<|start|>[user]one\n\ntwo[assistant]three[user]four[assistant]",
    ),
    # Somebody speaks of transcripts.
    (
      "What is \n\nAssistant:",
      "<|start|>[user]What is \n\nAssistant:[assistant]",
    ),
  )
  def test_chat(self, prompt, expected):
    rows = [_row(prompt, (" a\n\nb ", "c"))]
    self.assertEqual(
      chats.render(rows, BYTES, "chat"),
      ([_row(expected, ("a\n\nb", "c"))], []),
    )

  def test_prompts_of_a_task(self):
    render = chats.render_prompts
    self.assertEqual(render(["1+2=", "3"], "t", None, "plain"), ["1+2=", "3"])
    self.assertEqual(
      render(["1+2="], "t", BYTES, "chat"),
      ["<|start|>[user]1+2=[assistant]"],
    )
    with self.assertRaisesRegex(
      ValueError, "1 prompts do not fit the chat template: t"
    ):
      render(["1", "<|start|>2"], "t", BYTES, "chat")

  def test_a_row_that_the_template_refuses_is_named(self):
    alternating = _bytes(
      "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
      "{{ messages[0]['content'] }}"
    )
    rows = [_row(TRANSCRIPT, place="a"), _row("1+2=", place="b")]
    with self.assertLogs("absl", logging.WARNING) as logs:
      kept, skipped = chats.render(rows, alternating, "chat")
    self.assertEqual([row.place for row in kept], ["b"])
    self.assertRegex(skipped[0], "a: no chat prompt .*one turn")
    self.assertIn("1 of 2 rows do not fit the chat template", logs.output[0])
    encoded = encoding.prepare(
      alternating,
      rows,
      prompt_format="chat",
      max_prompt_length=9,
      max_response_length=9,
    )
    self.assertEqual(encoded.skipped, skipped)

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, "no chat template; use .*=plain"):
      chats.render([], _bytes(chat_template=None), "chat")
    with self.assertRaisesRegex(ValueError, 'must be "plain" or "chat", got'):
      chats.render([], BYTES, "markdown")
    once, _ = chats.render([_row()], BYTES, "chat")
    with self.assertRaisesRegex(
      ValueError, "here: .*already begins with a special"
    ):
      chats.render(once, BYTES, "chat")
    strict = _bytes("{{ raise_exception('Turns must alternate') }}")
    with self.assertRaisesRegex(ValueError, "here: .*Turns must alternate"):
      chats.render([_row()], strict, "chat")


class BestFirstTest(parameterized.TestCase):
  def test_order(self):
    row = _row(
      candidates=("a", "b", "c", "d"),
      rewards=(0.0, 2.0, -1.0, 2.0),
      value=0.5,
      advantage=-0.5,
      response_ids=(1,),
    )
    self.assertEqual(
      logged.best_first(row),
      _row(
        candidates=("b", "d", "a", "c"),
        rewards=(2.0, 2.0, 0.0, -1.0),
        value=0.5,
      ),
    )

  def test_the_first_is_the_best(self):
    row = _row(
      candidates=("a", "b", "c"),
      rewards=(1.0, 0.0, 1.0),
      advantage=0.5,
      response_ids=(1,),
    )
    expected = dataclasses.replace(
      row, candidates=("a", "c", "b"), rewards=(1.0, 1.0, 0.0)
    )
    self.assertEqual(logged.best_first(row), expected)

  def test_no_rewards(self):
    with self.assertRaisesRegex(ValueError, 'here: "reward" is missing'):
      logged.best_first(_row())


class FromMemoryTest(parameterized.TestCase):
  def test_rows(self):
    rows = logged.from_rows(
      ({"prompt": "1+2=", "response": str(i)} for i in range(2)), "sums"
    )
    self.assertEqual(
      rows, [_row(candidates=str(i), place=f"sums, row {i}") for i in range(2)]
    )
    with self.assertRaisesRegex(ValueError, 'sums, row 0: "prompt" is missing'):
      logged.from_rows([{"response": "3"}], "sums")

  def test_tasks(self):
    rows = logged.task_rows(word_lists, "test", 0, {"num": 3})
    self.assertLen(rows, 3)
    self.assertEqual(rows[2].place, "word_lists, test, row 2")
    self.assertEqual(rows[2].rewards, tuple(rows[2].rewards))
    prompts = logged.task_prompts(word_lists, "test", 0, 3)
    self.assertEqual(
      [row.prompt for row in prompts], [row.prompt for row in rows]
    )
    with self.assertRaisesRegex(ValueError, "arithmetic has no logged replies"):
      logged.task_rows(arithmetic, "test", 0, {})
    with self.assertRaisesRegex(ValueError, "no option 'nub'; it has num"):
      logged.task_rows(word_lists, "test", 0, {"nub": 3})

  def test_a_file_goes_before_a_task(self):
    with tempfile.TemporaryDirectory() as folder:
      path = f"{folder}/rows.jsonl"
      files.write_jsonl(path, [{"prompt": "a", "response": "b"}, {}])
      rows, unusable, _ = logged.load_or_draw(path, word_lists, "test", 0, {})
    self.assertEqual([row.candidates for row in rows], [("b",)])
    self.assertRegex(unusable[0], "rows.jsonl:2: ")
    self.assertEqual(
      logged.load_or_draw("", word_lists, "test", 0, {"num": 3}),
      (logged.task_rows(word_lists, "test", 0, {"num": 3}), [], []),
    )

  def test_first_replies(self):
    rows = [_row(candidates="ab", rewards=(0.5, 1.0)), _row(candidates="cd")]
    self.assertEqual(
      logged.first_replies(rows),
      [_row(candidates="a", rewards=(0.5,)), _row(candidates="c")],
    )

  def test_prompts(self):
    rows = logged.from_prompts(["1+2="], "sums")
    self.assertEqual(rows, [_row(candidates=(), place="sums, row 0")])
    with self.assertRaisesRegex(ValueError, 'sums, row 1: "prompt" is empty'):
      logged.from_prompts(["a", ""], "sums")


class ArraysTest(parameterized.TestCase):
  ROWS = (
    _row(candidates="ab", rewards=(1.0, 0.25), value=0.5),
    _row(candidates="a", rewards=(2.0,), value=0.5, advantage=0.75),
    _row(candidates="ab", value=1.0),
    _row(candidates="ab", rewards=(1.0, 2.0)),
    _row(candidates="ab", advantage=-1.0),
  )

  def test_range_of_rewards(self):
    logged.check_rewards(np.array([[0.0, np.nan], [0.5, 1.0]]), 1.0)
    with self.assertRaisesRegex(ValueError, r"in \[0, 1\], got -0.5 to 1"):
      logged.check_rewards(np.array([-0.5, 1.0]), 1.0)
    with self.assertRaisesRegex(ValueError, r"in \[0, 1\], got 0 to 5"):
      logged.check_rewards(np.array([0.0, 5.0, np.nan]), 1.0)

  def test_hand_computed(self):
    nan = np.nan
    found = logged.reward_array(self.ROWS)
    np.testing.assert_array_equal(
      found, [[1, 0.25], [2, nan], [nan, nan], [1, 2], [nan, nan]]
    )
    self.assertEqual(found.dtype, np.float32)
    found = logged.advantage_array(self.ROWS)
    np.testing.assert_array_equal(
      found, [[0.5, -0.25], [0.75, nan], [nan, nan], [nan, nan], [-1, nan]]
    )
    self.assertEqual(found.dtype, np.float32)
    np.testing.assert_array_equal(
      logged.present(self.ROWS), [[1, 1], [1, 0], [1, 1], [1, 1], [1, 1]]
    )


class EncodeTest(parameterized.TestCase):
  def _encode(self, rows, tokenizer=WORDS, limits=(9, 9), **settings):
    return encoding.encode(
      tokenizer,
      rows,
      max_prompt_length=limits[0],
      max_response_length=limits[1],
      **settings,
    )

  def test_ids(self):
    rows = [_row(candidates=("3", "1+2")), _row("", ("1=1",))]
    encoded = self._encode(rows, limits=(5, 4))
    self.assertEqual(encoded.prompt_ids, [[103, 1, 100, 2, 102], [103]])
    self.assertEqual(
      encoded.response_ids, [[[3, 104], [1, 100, 2, 104]], [[1, 102, 1, 104]]]
    )
    self.assertEqual((encoded.rows, encoded.skipped), (rows, []))

  def test_prompts_alone(self):
    rows = [_row(candidates=()), _row("1+2+4=", (), place="b")]
    with self.assertLogs("absl", logging.WARNING):
      encoded = self._encode(rows, limits=(5, 4))
    self.assertEqual(encoded.prompt_ids, [[103, 1, 100, 2, 102]])
    self.assertEqual(encoded.response_ids, [[]])
    self.assertIn("b: the prompt has 7 tokens", encoded.skipped[0])

  def test_as_pairs(self):
    rows = [_row("1", ("0", "=")), _row("naïve", (" a\n\nb",))]
    for tokenizer, num in ((WORDS, 1), (BYTES, 2)):
      pairs = [(row.prompt, c) for row in rows[:num] for c in row.candidates]
      expected = tokens.encode_pairs(
        tokenizer, pairs, max_prompt_length=20, max_response_length=20
      )
      with self.assertLogs("absl") if num == 1 else self.assertNoLogs("absl"):
        encoded = self._encode(rows[:num], tokenizer, (20, 20))
      found = [
        (prompt, response)
        for prompt, responses in zip(
          encoded.prompt_ids, encoded.response_ids, strict=True
        )
        for response in responses
      ]
      self.assertEqual(found, expected)

  def test_skip(self):
    rows = [
      _row(place="a"),
      _row("1+1+1=", place="b"),
      _row(candidates=("3", "1+2"), place="c"),
    ]
    with self.assertLogs("absl", logging.WARNING) as logs:
      encoded = self._encode(rows, limits=(5, 3))
    self.assertEqual(encoded.rows, rows[:1])
    self.assertLen(encoded.prompt_ids, 1)
    self.assertLen(encoded.response_ids, 1)
    self.assertIn("b: the prompt has 7 tokens", encoded.skipped[0])
    self.assertIn(
      "c: the prompt has 5 tokens and the longest reply 4", encoded.skipped[1]
    )
    self.assertIn("2 of 3 rows cannot be encoded: b: ", logs.output[-1])
    with self.assertRaisesRegex(ValueError, "No row is left: 2 of 2 .* b: "):
      self._encode(rows[1:], limits=(5, 3))

  def test_what_cannot_be_written_is_named(self):
    rows = [
      _row(place="a"),
      _row("one?", place="b"),
      _row(candidates=("3", "?"), place="c"),
    ]
    with self.assertLogs("absl", logging.WARNING) as logs:
      encoded = self._encode(rows, limits=(9, 9))
    self.assertEqual([row.place for row in encoded.rows], ["a"])
    self.assertLen(encoded.response_ids, 1)
    for place, message in zip("bc", encoded.skipped, strict=True):
      self.assertRegex(message, f"{place}: The tokenizer .* cannot encode")
    self.assertIn("2 of 3 rows cannot be encoded", logs.output[-1])

  def test_cut(self):
    rows = [_row(), _row("1+2+4=", ("7", "1+2"))]
    with self.assertLogs("absl", logging.WARNING) as logs:
      encoded = self._encode(rows, limits=(5, 3), too_long="cut")
    self.assertEqual(encoded.prompt_ids[1], [103, 2, 100, 4, 102])
    self.assertEqual(encoded.response_ids[1], [[7, 104], [1, 100, 2]])
    self.assertEqual(encoded.skipped, [])
    self.assertIn("1 of 2 prompts were cut on the left", logs.output[0])
    self.assertRegex(
      logs.output[1], "absl:1 of 3 responses .* lost their end token"
    )

  def test_a_cut_prompt_does_not_change_the_reply(self):
    # "2" behind "1" would be "12", but it stands behind "=".
    rows = [_row("1+1=", ("2",))]
    encoded = self._encode(rows, limits=(2, 3), too_long="cut")
    self.assertEqual(encoded.prompt_ids, [[103, 102]])
    self.assertEqual(encoded.response_ids, [[[2, 104]]])

  def test_error(self):
    with self.assertRaisesRegex(
      ValueError, "here: the prompt has 5 .* 4 and 9"
    ):
      self._encode([_row()], limits=(4, 9), too_long="error")
    # A prompt that nobody has answered has no reply to speak of.
    with self.assertRaisesRegex(
      ValueError, "here: .* 5 tokens, the limit is 4"
    ):
      self._encode([_row(candidates=())], limits=(4, 9), too_long="error")

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, 'too_long must be .* got "?.?drop'):
      self._encode([_row()], too_long="drop")
    with self.assertRaisesRegex(ValueError, "here: .*--prompt_format=chat"):
      self._encode([_row((ASKED,))])
    with self.assertRaisesRegex(ValueError, "max_response_length must be pos"):
      self._encode([_row()], limits=(1, 0))
    with self.assertRaisesRegex(ValueError, "There are no rows"):
      self._encode([])

  def test_logged_ids(self):
    # Drawn as 1, 2 where the text would be encoded as 12; and without end.
    rows = [
      _row(candidates=("12",), response_ids=(1, 2)),
      _row(candidates=("12", "3"), response_ids=(1, 3)),
      _row(candidates=("12",), response_ids=(12, 107)),
      _row(candidates=("12",), response_ids=()),
    ]
    with self.assertLogs("absl", logging.WARNING) as logs:
      encoded = self._encode(rows)
    self.assertEqual(
      encoded.response_ids,
      [[[1, 2]], [[12, 104], [3, 104]], [[12, 104]], [[12, 104]]],
    )
    self.assertRegex(logs.output[0], "3 of 4 .* differ from their ids")

  def test_one_start_token(self):
    rows, _ = chats.render([_row((ASKED,)), _row()], BYTES, "chat")
    rows.append(_row())
    encoded = self._encode(rows, BYTES, (40, 5))
    for ids in encoded.prompt_ids:
      self.assertEqual(ids.count(BYTES.bos_token_id), 1)
      self.assertEqual(ids[0], BYTES.bos_token_id)
    self.assertEqual(BYTES.decode(encoded.prompt_ids[0]), rows[0].prompt)
    self.assertEqual([len(r[0]) for r in encoded.response_ids], [2, 2, 2])

  def test_chat_of_a_real_tokenizer(self):
    try:
      tokenizer = hf.load_tokenizer("smollm2-135m")
    except (ImportError, ValueError) as error:
      pytest.skip(str(error))
    rows, _ = chats.render([_row(TRANSCRIPT, (" a\n\nb",))], tokenizer, "chat")
    encoded = self._encode(rows, tokenizer, (99, 9))
    (prompt,), ((response,),) = encoded.prompt_ids, encoded.response_ids
    self.assertEqual(tokenizer.decode(prompt), rows[0].prompt)
    self.assertEqual(rows[0].prompt.count("four<|im_end|>"), 1)
    self.assertNotEqual(prompt[1], tokenizer.bos_token_id)
    self.assertEqual(tokenizer.decode(response), "a\n\nb" + tokenizer.eos_token)


class BatchTest(parameterized.TestCase):
  ENCODED = encoding.Encoded(
    [[1, 2], [3]], [[[4, 9]], [[5, 6, 9], [7, 9]]], [_row(), _row()], []
  )

  def test_hand_computed(self):
    batch = encoding.batch(
      self.ENCODED,
      np.array([1, 0, 0]),
      np.array([1, 0, 1]),
      prompt_length=3,
      response_length=3,
      pad_id=8,
    )
    np.testing.assert_array_equal(
      batch["prompt_ids"], [[8, 8, 3], [8, 1, 2], [8, 1, 2]]
    )
    np.testing.assert_array_equal(
      batch["response_ids"], [[7, 9, 8], [4, 9, 8], [8, 8, 8]]
    )
    np.testing.assert_array_equal(batch["response_mask"].sum(axis=1), [2, 2, 0])
    np.testing.assert_array_equal(batch["prompt_mask"].sum(axis=1), [1, 2, 2])

  @parameterized.parameters(([-1], [0]), ([0], [-1]))
  def test_bad_numbers(self, rows, candidates):
    with self.assertRaisesRegex(ValueError, "counted from 0"):
      encoding.batch(
        self.ENCODED, rows, candidates, prompt_length=3, response_length=3
      )


class ReadTest(parameterized.TestCase):
  """A log as scripts read it: rows, ids and the shape of batches in one."""

  LIMITS = {
    "max_prompt_length": 5,
    "max_response_length": 4,
    "too_long": "skip",
    "prompt_format": "plain",
  }

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(folder) / "log.jsonl"
    rows = [
      {"prompt": "9", "response": "9"},
      {"prompt": "1", "candidates": ["2", "1+2"], "rewards": [1, 0]},
      {},
      {"prompt": "1+2+3=", "response": "6"},
      {"prompt": "1+2=", "response": "3"},
      {"prompt": "8", "response": "8"},
    ]
    files.write_jsonl(self.path, rows)

  def _read(self, name=None, task=None, **options):
    return encoding.read(
      WORDS,
      name=str(self.path) if name is None else name,
      task=task,
      seed=0,
      **self.LIMITS,
      **options,
    )

  def test_rows_and_what_is_left_out(self):
    # The first usable row is passed over, and three are taken.
    log = self._read(first_row=1, num_rows=3)
    self.assertEqual([row.prompt for row in log.rows], ["1", "1+2="])
    self.assertEqual(log.encoded.rows, log.rows)
    self.assertEqual(
      log.encoded.response_ids,
      [[[2, 104], [1, 100, 2, 104]], [[3, 104]]],
    )
    self.assertRegex(log.skipped[0], "log.jsonl:3: it has none of")
    self.assertRegex(log.skipped[1], "log.jsonl:4: the prompt has 7 tokens")
    self.assertLen(log.skipped, 2)
    self.assertEqual(log.settings, self.LIMITS)
    np.testing.assert_array_equal(log.present, [[True, True], [True, False]])
    # The longest have 5 and 4 tokens; buckets hold 6 and 4.
    self.assertEqual(log.lengths, (6, 4))
    self.assertLen(self._read().rows, 4)

  def test_batches_of_any_shape(self):
    log = self._read(first_row=1, num_rows=3)
    pad = vocabularies.pad_id(WORDS)
    batch = log.batch(np.array([1, 0]), np.array([0, 1]))
    np.testing.assert_array_equal(
      batch["prompt_ids"],
      [[pad, 103, 1, 100, 2, 102], [pad] * 4 + [103, 1]],
    )
    np.testing.assert_array_equal(
      batch["response_ids"], [[3, 104, pad, pad], [1, 100, 2, 104]]
    )
    # Both replies to each row, the second of which has but one.
    ranked = log.batch(np.array([[0], [1]]), np.array([[1, 0], [0, 1]]))
    self.assertEqual(ranked["prompt_ids"].shape, (2, 2, 6))
    self.assertEqual(ranked["response_mask"].shape, (2, 2, 4))
    np.testing.assert_array_equal(
      ranked["response_mask"].sum(axis=-1), [[4, 2], [2, 0]]
    )
    np.testing.assert_array_equal(
      ranked["response_ids"][0, 0], batch["response_ids"][1]
    )
    np.testing.assert_array_equal(
      ranked["prompt_ids"][1, 1], batch["prompt_ids"][0]
    )

  def test_the_log_of_a_task(self):
    log = encoding.read(
      word_lists.word_tokenizer(),
      name="",
      task=word_lists,
      seed=3,
      task_options={"num": 4},
      split="test",
      **self.LIMITS | {"max_prompt_length": 16, "max_response_length": 16},
    )
    self.assertEqual(
      log.rows, logged.task_rows(word_lists, "test", 3, {"num": 4})
    )
    self.assertEqual(log.skipped, [])

  def test_nothing_is_left(self):
    with self.assertRaisesRegex(ValueError, "There are no rows to encode"):
      self._read(first_row=5)


class LengthsTest(parameterized.TestCase):
  def test_buckets(self):
    # The longest have 7 and 5 tokens; buckets hold 8 and 6.
    encoded = encoding.Encoded(
      [[1] * 7, [1] * 2], [[[1] * 5, [1]], [[1] * 3]], [_row(), _row()], []
    )
    self.assertEqual(encoding.lengths(encoded), (8, 6))
    encoded = encoding.Encoded([[1] * 2], [[[1] * 3]], [_row()], [])
    self.assertEqual(encoding.lengths(encoded), (2, 3))


class FingerprintTest(parameterized.TestCase):
  ROW = _row(TRANSCRIPT, ("né", "b"), (0.1, 2.0))

  @parameterized.parameters(
    {"prompt": "x"},
    {"prompt": (ASKED,)},
    {"candidates": ("b", "né")},
    {"rewards": (0.1, 2.5)},
    {"rewards": None},
  )
  def test_what_counts(self, **change):
    changed = dataclasses.replace(self.ROW, **change)
    found = logged.fingerprint([self.ROW])
    self.assertNotEqual(logged.fingerprint([changed]), found)
    self.assertNotEqual(
      logged.fingerprint([self.ROW, changed]),
      logged.fingerprint([changed, self.ROW]),
    )

  def test_what_does_not_count(self):
    moved = dataclasses.replace(self.ROW, place="there", value=1.0)
    self.assertEqual(
      logged.fingerprint([moved]), logged.fingerprint([self.ROW])
    )

  def test_another_process(self):
    row = _row(({"content": "né", "role": "user"},), ("a",), (0.1,))
    program = (
      "from rljax.text import forms, logged\n"
      "row = forms.parse({'prompt': [{'role': 'user', 'content': 'n\\xe9'}], "
      "'response': 'a', 'reward': 0.1}, 'elsewhere')\n"
      "print(logged.fingerprint([row]))"
    )
    done = subprocess.run(
      [sys.executable, "-c", program],
      cwd=conftest.REPOSITORY,
      capture_output=True,
      text=True,
      check=True,
    )
    self.assertEqual(done.stdout.strip(), logged.fingerprint([row]))

  def test_ids(self):
    def of(prompts, responses):
      return encoding.fingerprint_ids(
        encoding.Encoded(prompts, responses, [self.ROW], [])
      )

    found = of([[1, 2]], [[[3], [4]]])
    self.assertEqual(found, of([[1, 2]], [[[3], [4]]]))
    self.assertNotEqual(found, of([[1]], [[[2, 3], [4]]]))
    self.assertNotEqual(found, of([[1, 2]], [[[3, 4]]]))

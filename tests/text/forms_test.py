"""What a file holds is recognised once, by its columns, and said."""

import json
import pathlib
import tempfile

from absl.testing import parameterized

from rljax.text import columns, files, forms, logged

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ASKED = {"role": "user", "content": "1+2="}


def _said(content):
  return {"role": "assistant", "content": content}


def _shared(*pairs):
  return [{"from": speaker, "value": text} for speaker, text in pairs]


class FormsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("completion", {"prompt": "a", "completion": " b"}, "a", (" b",), None),
    (
      "messages_as_completion",
      {"prompt": [ASKED], "completion": [_said("3")]},
      (ASKED,),
      ("3",),
      None,
    ),
    (
      "good",
      {"prompt": "a", "completion": "b", "label": True},
      "a",
      ("b",),
      (1.0,),
    ),
    (
      "good_in_words",
      {"prompt": "a", "completion": "b", "label": "True"},
      "a",
      ("b",),
      (1.0,),
    ),
    (
      "bad",
      {"prompt": "a", "completion": "b", "label": 0},
      "a",
      ("b",),
      (0.0,),
    ),
    ("dialogue", {"messages": [ASKED, _said("3")]}, (ASKED,), ("3",), None),
    (
      "parts",
      {"messages": [ASKED, _said([{"type": "text", "text": "3"}])]},
      (ASKED,),
      ("3",),
      None,
    ),
    (
      "shared",
      {"conversations": _shared(("human", "1+2="), ("gpt", "3"))},
      (ASKED,),
      ("3",),
      None,
    ),
    (
      "shared_system",
      {
        "system": "Sum.",
        "conversations": _shared(("human", "1+2="), ("gpt", "3")),
      },
      ({"role": "system", "content": "Sum."}, ASKED),
      ("3",),
      None,
    ),
    (
      "instruction",
      {"instruction": "Add.", "input": "1, 2", "output": "3"},
      "Add.\n\n1, 2",
      ("3",),
      None,
    ),
    (
      "instruction_alone",
      {"instruction": "Add.", "input": "", "output": "3", "reward": 1},
      "Add.",
      ("3",),
      (1.0,),
    ),
    (
      "pair_that_begins_alike",
      {"chosen": "The sky is blue.", "rejected": "The sky is blowing."},
      "The sky is",
      (" blue.", " blowing."),
      None,
    ),
  )
  def test_forms(self, row, prompt, candidates, rewards):
    found = forms.parse(row, "here")
    self.assertEqual(
      (found.prompt, found.candidates, found.rewards, found.dialogue),
      (prompt, candidates, rewards, None),
    )

  def test_several_turns(self):
    messages = (ASKED, _said("3"), {"role": "user", "content": "?"}, _said("4"))
    late = {"role": "user", "content": "!"}
    for row in (
      {"messages": [*messages, late]},
      {"prompt": [ASKED], "completion": list(messages[1:])},
    ):
      found = forms.parse(row, "here")
      self.assertEqual(found.prompt, messages[:3])
      self.assertEqual(found.candidates, ("4",))
      self.assertEqual((found.dialogue, found.num_asked), (messages, 1))
    # A turn of the assistant in the prompt is none to learn from.
    row = {"prompt": list(messages[:3]), "completion": [_said("4")]}
    found = forms.parse(row, "here")
    self.assertEqual((found.prompt, found.dialogue), (messages[:3], None))

  def test_prompts(self):
    for row, prompt in (
      ({"messages": [ASKED]}, (ASKED,)),
      ({"messages": [ASKED, _said("3")]}, (ASKED,)),
      ({"conversations": _shared(("human", "1+2="))}, (ASKED,)),
      ({"instruction": "Add.", "input": None}, "Add."),
      ({"prompt": None, "messages": [ASKED]}, (ASKED,)),
      ({"prompt": "a", "gold": 3}, "a"),
    ):
      self.assertEqual(forms.ask(row, "here").prompt, prompt)
    with self.assertRaisesRegex(ValueError, '^here: "messages" is empty.$'):
      forms.ask({"messages": []}, "here")

  @parameterized.parameters(
    ({"messages": [ASKED]}, '"messages" has no reply of the assistant'),
    ({"messages": [_said("3")]}, '"messages" begins with the assistant'),
    ({"messages": [ASKED, _said(" ")]}, '"messages" is empty'),
    ({"messages": "text"}, '"messages" must be a text or messages, got str'),
    (
      {"messages": [{"role": "user", "content": [{"image": 1}]}]},
      "has a part that is no text",
    ),
    ({"conversations": _shared(("robot", "a"))}, '"from" .* got .robot'),
    ({"conversations": [{"from": 5}]}, '"from" .* got 5'),
    ({"prompt": "a", "completion": "b", "label": 0.7}, '"label" must be true'),
    ({"prompt": "a", "completion": "b", "label": "x"}, "got the text 'x'"),
    (
      {"messages": [ASKED, _said(None) | {"tool_calls": [{}]}, _said("3")]},
      'a message of "messages" calls a tool, which is not read',
    ),
    (
      {"conversations": _shared(("human", "a"), ("function_call", "{}"))},
      'a message of "conversations" calls a tool, which is not read',
    ),
    (
      {"messages": [ASKED, _said("2") | {"weight": 0}, ASKED, _said("3")]},
      'a message of "messages" has a "weight" of 0, which is not read',
    ),
    (
      {"question": "a", "chosen": "b", "rejected": "c"},
      '"prompt" is missing, and "chosen" has no .*Assistant',
    ),
    ({"completion": "b"}, '"prompt" is missing'),
    ({"instruction": " ", "output": "b"}, '"instruction" is empty'),
    ({"instruction": "a", "output": ""}, '"output" is empty'),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    ({"prompt": "a", "response": "b", "finished": "no"}, '"finished" must be'),
    ({"prompt": "a", "response": "b", "reward": 1e39}, "a finite number, got"),
    ({"question": "a", "answer": "b"}, "nor another form of replies"),
  )
  def test_unusable(self, row, message):
    with self.assertRaisesRegex(ValueError, f"^here: .*{message}"):
      forms.parse(row, "here")

  @parameterized.parameters(
    *[
      ({"prompt": "a", "response": "b", name: value}, name, '"reward"')
      for name, value in (
        ("score", 1.0),
        ("rating", 5),
        ("label", True),
        ("rewards", [1.0]),
      )
    ],
    ({"prompt": "a", "completion": "b", "score": 1.0}, "score", '"reward"'),
    (
      {"prompt": "a", "candidates": ["b"], "scores": [1.0]},
      "scores",
      '"rewards"',
    ),
    ({"prompt": "a", "candidates": ["b"], "reward": 1}, "reward", '"rewards"'),
    (
      {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_rating": 1},
      "chosen_rating",
      '"chosen_score"',
    ),
  )
  def test_rewards_under_another_name(self, row, name, right):
    with self.assertRaisesRegex(
      columns.WrongColumn, f'here: the column "{name}" is not read.*{right}'
    ):
      forms.parse(row, "here")

  def test_a_reward_beside_another_column(self):
    row = {"prompt": "a", "response": "b", "reward": 1, "score": 7}
    self.assertEqual(forms.parse(row, "here").rewards, (1.0,))

  def test_cut_replies(self):
    row = {"prompt": "a", "response": "b", "finished": False}
    self.assertEqual(forms.parse(row, "x").finished, (False,))
    self.assertEqual(forms.parse(row | {"finished": True}, "x").finished, ())
    row = {"prompt": "a", "candidates": ["b", "c"], "rewards": [1, 0]}
    row["finished"] = [True, False]
    self.assertEqual(forms.parse(row, "x").finished, (True, False))


class FilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self._temporary = tempfile.TemporaryDirectory()
    self.addCleanup(self._temporary.cleanup)
    self.path = pathlib.Path(self._temporary.name) / "rows.jsonl"

  def _load(self, rows, **options):
    files.write_jsonl(self.path, rows)
    return logged.load(str(self.path), **options)

  def test_replies_that_begin_like_their_prompt(self):
    hello = {
      "prompt": "Hello",
      "chosen": "Hello! How can I help?",
      "rejected": "Hello.",
    }
    loaded = self._load([hello])
    self.assertEqual(
      loaded.rows[0].candidates, (hello["chosen"], hello["rejected"])
    )
    # Nor where the others say that replies are whole.
    again = {"prompt": "Hi!", "chosen": "Hi! You?", "rejected": "Hi! Me?"}
    loaded = self._load([again, hello, {**hello, "prompt": "What?"}])
    self.assertEqual(loaded.rows[0].candidates, ("Hi! You?", "Hi! Me?"))
    self.assertIn("1 of 3 pairs begin with their prompt", loaded.notes[-1])

  def test_single_replies_that_repeat_their_prompts_are_said(self):
    rows = [{"prompt": f"{i}+1=", "response": f"{i}+1=2"} for i in range(9)]
    loaded = self._load(rows)
    self.assertEqual(loaded.rows[0].candidates, ("0+1=2",))
    self.assertIn("9 replies begin with their prompt", loaded.notes[-1])
    self.assertLen(self._load([rows[0], {"prompt": "a", "response": "b"}]), 3)
    self.assertNotIn("begin with", "".join(loaded.notes[:-1]))

  def test_replies_behind_their_prompts(self):
    rows = [
      {"prompt": p, "chosen": f"{p} good {i}", "rejected": f"{p} bad"}
      for i, p in enumerate(f"What is {n}?" for n in range(20))
    ]
    rows[3]["chosen"] = "No."
    loaded = self._load(rows)
    self.assertLen(loaded.rows, 19)
    self.assertEqual(loaded.rows[0].candidates, (" good 0", " bad"))
    self.assertRegex(loaded.skipped[0], ":4: .chosen. does not begin with the")
    self.assertIn("19 pairs begin with their prompt", loaded.notes[-1])

  def test_whole_transcripts_beside_a_prompt(self):
    whole = f"{HUMAN} hi{ASSISTANT} Hello{HUMAN} and?{ASSISTANT}"
    for prompt in (whole, "and?", "hi", whole.removesuffix(ASSISTANT)):
      row = {"chosen": f"{whole} Well.", "rejected": f"{whole} No."}
      loaded = self._load([row | {"prompt": prompt}])
      self.assertEqual(loaded.rows[0].prompt, whole)
      self.assertEqual(loaded.rows[0].candidates, (" Well.", " No."))
    with self.assertRaisesRegex(ValueError, "does not continue the prompt"):
      self._load([row | {"prompt": "else"}])

  def test_pairs_that_begin_alike(self):
    rows = [
      {"chosen": f"{i} and 1 is {i + 1}", "rejected": f"{i} and 1 is no"}
      for i in range(20)
    ]
    loaded = self._load([*rows, {"chosen": "one", "rejected": "two"}])
    self.assertEqual(loaded.rows[7].prompt, "7 and 1 is")
    self.assertRegex(loaded.skipped[0], "do not begin alike")
    self.assertIn("20 pairs begin alike", loaded.notes[-1])
    # One beginning in twenty is chance.
    rows = [{"chosen": f"{i} a", "rejected": f"no {i}"} for i in range(20)]
    with self.assertRaisesRegex(ValueError, "has no .*Assistant"):
      self._load([*rows, {"chosen": "I am", "rejected": "I was"}])

  def test_what_is_said(self):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "id": 1, "by": "me"}
    same = pair | {"chosen": "c"}
    loaded = self._load([pair, same, same, {"prompt": "a"}, pair])
    self.assertEqual(
      loaded.notes,
      [
        f"{self.path}: 2 of 5 rows are used, as pairs "
        "(prompt, chosen, rejected; or chosen, rejected that begin alike).",
        f"{self.path}: columns not read: id, by.",
        f'{self.path}: 3 rows are left out: "chosen" and "rejected" are the '
        'same (2); it has none of "response", "candidates" and "chosen", nor '
        "another form of replies (1).",
      ],
    )

  def test_several_forms(self):
    loaded = self._load(
      [{"prompt": "a", "response": "b"}, {"instruction": "a", "output": "b"}]
    )
    self.assertIn("replies (prompt, response, and reward", loaded.notes[0])
    self.assertIn("instructions (instruction, input, output)", loaded.notes[0])
    self.assertEqual([r.form for r in loaded.rows], ["replies", "instructions"])

  def test_a_wrong_file(self):
    with self.assertRaisesRegex(
      ValueError,
      "No row is left: 1 of 1 rows .*Its columns are question, answer. Perhaps "
      'rename "question" to "prompt", "answer" to "response". What is read: '
      "prompt, chosen, .*instruction, input, output",
    ):
      self._load([{"question": "a", "answer": "b"}])
    with self.assertRaisesRegex(
      ValueError, ':1: "prompt" is missing.*Perhaps rename "question" to "pro'
    ) as caught:
      logged.load_prompts(str(self.path))
    self.assertNotIn('"answer" to', str(caught.exception))
    with self.assertRaisesRegex(ValueError, 'rename " Prompt" to "prompt"'):
      self._load([{" Prompt": "a", "response": "b"}])

  def test_keys_of_messages_that_are_passed_over(self):
    thought = _said("3") | {"reasoning_content": "1 and 2", "name": None}
    loaded = self._load([{"messages": [ASKED, thought]}] * 2)
    self.assertEqual(
      loaded.notes[-1],
      f'{self.path}: 2 rows have messages with "reasoning_content", which is '
      "not read.",
    )
    self.assertLen(loaded.notes, 2)

  def test_rewards_under_another_name_stop(self):
    rows = [{"prompt": "a", "response": "b", "reward": 1}]
    with self.assertRaisesRegex(ValueError, ':2: the column "score"'):
      self._load([*rows, {"prompt": "a", "response": "b", "score": 1}])

  def test_dialogues_that_end_with_the_user(self):
    loaded = self._load([{"messages": [ASKED, _said("3"), ASKED]}])
    self.assertIn("1 dialogues end with the user", loaded.notes[-1])

  def test_no_more_rows_than_asked_for(self):
    rows = [{"prompt": "a", "response": str(i)} for i in range(9)]
    files.write_jsonl(self.path, rows)
    with self.path.open("a") as file:
      file.write(json.dumps({"prompt": "a", "response": "b", "score": 1}))
    loaded = logged.load(str(self.path), limit=3)
    self.assertEqual([r.candidates[0] for r in loaded.rows], ["0", "1", "2"])

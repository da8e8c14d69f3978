"""Tests of responders, and of the files that they draw into."""

import collections
import contextlib
import functools
import io
import pathlib
import tempfile
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from rljax.distributed import meshes
from rljax.evaluation import answers
from rljax.generation import forced, responders, responses
from rljax.storage import calls
from rljax.tasks import word_lists
from rljax.text import batches, files, tokens
from tests import stand_in
from tests.generation import drawing

pytest.importorskip("tokenizers")


class ResponderTest(parameterized.TestCase):
  @parameterized.parameters((1, "data:1"), (3, "data:1"), (8, "data:4,fsdp:2"))
  def test_greedy_replies(self, batch_size, spec):
    mesh = meshes.make(spec)
    responder = drawing.responder(batch_size=batch_size, mesh=mesh)
    self.assertEqual(responder.num_prompts, 7)
    for seed in range(2):
      found = responder(meshes.replicate(drawing.params(seed), mesh))
      self.assertEqual(
        found, [drawing.greedily(seed, prompt) for prompt in drawing.PROMPTS]
      )
      self.assertGreater(len(set(found)), 4)
    # The last batch is filled up, and new parameters change no shape.
    self.assertLen(responder.program.compilations, 1)

  def test_sampled_replies(self):
    asked = [*drawing.PROMPTS, drawing.PROMPTS[0]]
    found = []
    for batch_size, spec, seed in (
      (3, "data:1", 5),
      (8, "data:8", 5),
      (8, "data:1", 6),
    ):
      mesh = meshes.make(spec)
      responder = drawing.responder(
        asked,
        settings=drawing.SAMPLED,
        batch_size=batch_size,
        mesh=mesh,
        seed=seed,
      )
      params = meshes.replicate(drawing.params(), mesh)
      found.append(responder(params))
      # Asked again, it says the same.
      self.assertEqual(responder(params), found[-1])
      self.assertLen(responder.program.compilations, 1)
    first, other_batches, other_seed = found
    self.assertEqual(first, other_batches)
    for one, other in zip(first, other_seed, strict=True):
      self.assertNotEqual(one, other)
    # Equal prompts have replies of their own.
    self.assertNotEqual(first[0], first[-1])

  def test_stop_strings(self):
    asked = [f"{i}+{i + 1}=" for i in range(40, 56)]
    # The numbers below ten and "=" are likely, all else is not.
    table = np.zeros(
      (32, len(drawing.NUMBERS), len(drawing.NUMBERS)), np.float32
    )
    table[..., :10] = table[..., drawing.NUMBERS.convert_tokens_to_ids("=")] = (
      6.0
    )
    params = stand_in.params(table)
    stops = ("=3", "9")
    responder = drawing.responder(
      asked,
      drawing.NUMBERS,
      stand_in.model(len(drawing.NUMBERS)),
      settings=drawing.SAMPLED,
      max_length=12,
      batch_size=16,
      stop_strings=stops,
    )
    replies = responder(params)
    # What was drawn, with the strings.
    ids, mask = batches.pad_left(
      tokens.encode_prompts(drawing.NUMBERS, asked, max_length=9)
    )
    indices = np.arange(16, dtype=np.int32)
    batch = {"ids": ids, "mask": mask, "indices": indices}
    batch["lengths"] = np.full(16, 12, np.int32)
    drawn = responder.program(jax.random.key(0), params, batch)
    ends = collections.Counter()
    for text, reply in zip(
      responses.read(drawing.NUMBERS, drawn), replies, strict=True
    ):
      # The first of them ended it: nothing was drawn behind.
      self.assertStartsWith(text, reply)
      end = text.removeprefix(reply)
      self.assertIn(end, ("", *stops))
      for stop in stops:
        self.assertNotIn(stop, reply)
      ends[end] += 1
    for end in stops:
      self.assertGreater(ends[end], 0)

  def test_end_token(self):
    # A policy that wants to end, else to say "crow", else anything.
    table = np.zeros((32, len(drawing.WORDS), len(drawing.WORDS)), np.float32)
    table[..., drawing.WORDS.eos_token_id] = 9.0
    table[..., drawing.WORDS.convert_tokens_to_ids("crow")] = 6.0
    params = stand_in.params(table)
    ask = functools.partial(
      drawing.responder, model=stand_in.model(len(drawing.WORDS))
    )
    self.assertEqual(ask()(params), [""] * 7)
    for reply in ask(stop_at_eos=False, settings=drawing.SAMPLED)(params):
      self.assertLen(reply.split(), drawing.MAX_LENGTH)
      self.assertIn("crow", reply)

  def test_forced_tokens_are_no_part_of_the_texts(self):
    # A policy that says "owl" after "crow", else "crow"; "dove" is forced first
    # and behind every "owl".
    ids = {
      w: drawing.WORDS.convert_tokens_to_ids(w) for w in ("crow", "owl", "dove")
    }
    table = np.zeros((32, len(drawing.WORDS), len(drawing.WORDS)), np.float32)
    table[..., ids["crow"]] = 5.0
    table[:, ids["crow"], ids["owl"]] = 9.0
    forced = np.full(len(drawing.WORDS) + 1, -1, np.int32)
    forced[[len(drawing.WORDS), ids["owl"]]] = ids["dove"]
    ask = functools.partial(
      drawing.responder, model=stand_in.model(len(drawing.WORDS))
    )
    params = stand_in.params(table)
    self.assertEqual(ask()(params)[0].split(), ["crow", "owl"] * 3)
    self.assertEqual(ask(forced=forced)(params)[0].split(), ["crow", "owl"] * 2)

  def test_bad_input(self):
    # Eight columns hold the longest prompt.
    drawing.responder(max_length=56)
    with self.assertRaisesRegex(
      ValueError, "take up to 65 tokens .* the model has 64 positions"
    ):
      drawing.responder(max_length=57)
    with self.assertRaisesRegex(
      ValueError, "batch_size must be divisible by the 8 devices .* got 12"
    ):
      drawing.responder(batch_size=12, mesh=meshes.make())
    with self.assertRaisesRegex(ValueError, "no decoder"):
      drawing.responder(stop_strings=["owl"])
    no_end = word_lists.word_tokenizer()
    no_end.eos_token = None
    with self.assertRaisesRegex(ValueError, "end token"):
      drawing.responder(tokenizer=no_end)
    drawing.responder(tokenizer=no_end, stop_at_eos=False)


class CollectTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.params = drawing.params()
    self.folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(self.folder, "a", "x.jsonl")
    self.asked = []

  def score(self, prompts, replies):
    self.asked += prompts
    scores = np.float32([len(reply) for reply in replies])
    return scores, [{"is_correct": True, "answer": reply} for reply in replies]

  def collect(self, num_samples=3, prompts=drawing.PROMPTS, **options):
    responder = drawing.responder(
      prompts, settings=drawing.SAMPLED, batch_size=2, num_samples=num_samples
    )
    return responders.collect(
      self.path, responder, self.params, prompts, self.score, **options
    )

  def test_rows(self):
    seen = []
    rows = self.collect(progress=lambda done, batch: seen.append(done))
    self.assertEqual(seen, [2, 4, 6, 7])
    places = [(row["index"], row["sample"]) for row in rows]
    self.assertEqual(places, [(i, j) for i in range(7) for j in range(3)])
    self.assertEqual(
      [row["prompt"] for row in rows], np.repeat(drawing.PROMPTS, 3).tolist()
    )
    self.assertEqual(files.read_jsonl(self.path), rows)
    # They are those that the responder gives.
    responder = drawing.responder(
      settings=drawing.SAMPLED, batch_size=7, num_samples=3
    )
    self.assertEqual([row["response"] for row in rows], responder(self.params))
    ended = [
      bool(ended)
      for *_, batch in responder.batches(self.params)
      for ended in batch
    ]
    self.assertEqual([row["finished"] for row in rows], ended)
    self.assertContainsSubset([True, False], ended)
    for row in rows:
      # What ran out of length earned nothing and has no answer.
      self.assertEqual(row["parts"]["is_correct"], row["finished"])
      expected = row["response"] if row["finished"] else None
      self.assertEqual(row["parts"]["answer"], expected)
      self.assertEqual(row["reward"], len(row["response"]) * row["finished"])

  def test_evaluate_is_collect_without_a_file(self):
    rows = self.collect(num_samples=1)
    responder = drawing.responder(
      settings=drawing.SAMPLED, batch_size=2, texts=drawing.PROMPTS
    )
    found = answers.evaluate(responder, self.params, self.score)
    places = [{"index": i, "sample": 0} for i in range(len(drawing.PROMPTS))]
    self.assertEqual(
      [place | row for place, row in zip(places, found, strict=True)], rows
    )
    self.assertEqual([row["response"] for row in found], responder(self.params))
    self.assertEqual({type(row["finished"]) for row in found}, {bool})

  @parameterized.parameters(0, 1, 2, 3, 5, 6)
  def test_killed_and_called_again(self, num_rows):
    whole = self.collect()
    content = self.path.read_bytes()
    lines = content.splitlines(keepends=True)
    # Killed within a row.
    self.path.write_bytes(b"".join(lines[:num_rows]) + lines[num_rows][:20])
    self.asked = []
    self.assertEqual(self.collect(), whole)
    self.assertEqual(self.path.read_bytes(), content)
    # Prompts that were answered in full are not asked again.
    self.assertLen(self.asked, 21 - 3 * (num_rows // 3))
    self.asked = []
    self.assertEqual(self.collect(), whole)
    self.assertEqual(self.asked, [])

  @parameterized.parameters(0, 2, 3, 5)
  def test_what_was_scored_before_an_error_is_kept(self, num_scored):
    whole = self.collect()
    content = self.path.read_bytes()
    self.path.unlink()
    self.asked = []
    batches = []

    def fail(prompts, replies):
      """Answers a part of the second batch."""
      batches.append(len(prompts))
      if len(batches) != 2:
        return self.score(prompts, replies)
      scores, parts = self.score(prompts[:num_scored], replies[:num_scored])
      done = list(zip(scores, parts, strict=True))
      raise calls.CallError("no answer.", done)

    fail.source = "each by itself"
    responder = drawing.responder(
      settings=drawing.SAMPLED, batch_size=2, num_samples=3
    )
    arguments = self.path, responder, self.params, drawing.PROMPTS, fail
    with self.assertRaisesRegex(
      calls.CallError,
      f"no answer. {6 + num_scored} responses .*x.jsonl: the same command"
      if num_scored
      else "no answer.$",
    ):
      responders.collect(*arguments)
    self.assertLen(files.read_jsonl(self.path), 6 + num_scored)
    self.assertEqual(responders.collect(*arguments), whole)
    self.assertEqual(self.path.read_bytes(), content)
    self.assertLen(self.asked, 21)  # None twice.

  def test_a_damaged_file_is_set_aside(self):
    whole = self.collect()
    content = self.path.read_bytes()
    lines = content.splitlines(keepends=True)
    damaged = b"".join([*lines[:6], b"\0\0\n", *lines[7:]])
    self.path.write_bytes(damaged)
    with contextlib.redirect_stdout(io.StringIO()) as said:
      self.assertEqual(self.collect(), whole)
    self.assertRegex(said.getvalue(), "x.jsonl:7: not JSON .*x.jsonl.old1")
    self.assertEqual(self.path.read_bytes(), content)
    aside = self.path.with_name("x.jsonl.old1")
    self.assertEqual(aside.read_bytes(), damaged)

  def test_further_draws(self):
    first = self.collect(draw=1)
    self.path.unlink()
    self.assertNotEqual(self.collect(draw=2), first)
    self.path.unlink()
    self.assertEqual(self.collect(draw=1), first)

  def test_file_of_something_else(self):
    self.collect()
    with self.assertRaisesRegex(ValueError, "has 7 prompts, and 6 texts"):
      responders.collect(
        self.path,
        drawing.responder(),
        self.params,
        drawing.PROMPTS[1:],
        self.score,
      )
    for options in (
      {"num_samples": 2},
      {"prompts": drawing.PROMPTS[1:]},
      {"prompts": drawing.PROMPTS[:-1]},
    ):
      with self.assertRaisesRegex(ValueError, "samples of other prompts, from"):
        self.collect(**options)

  def test_forced_tokens_are_filed(self):
    self.assertEqual(forced.load(self.folder), {})
    self.assertEqual(forced.load("smollm2-135m"), {})
    following = np.full(8, -1, np.int32)
    following[[2, 7]] = 5
    for shown_as in (None, 3):
      forced.save(self.folder, following, shown_as)
      found = forced.load(self.folder)
      np.testing.assert_array_equal(found["forced"], following)
      self.assertEqual(found["forced_as"], shown_as)


class ProgressTest(parameterized.TestCase):
  def test_prints_now_and_then_and_at_the_end(self):
    rows = [{"parts": {"is_correct": i < 3}} for i in range(4)]
    progress = responders.Progress("round 1", 9, seconds=1000)
    with mock.patch("builtins.print") as printed:
      for done in (4, 8, 9):
        progress(done, rows)
    lines = [call.args[0] for call in printed.call_args_list]
    self.assertEqual(
      lines,
      [
        "round 1: 4 of 9 prompts, 75% of the last right",
        "round 1: 9 of 9 prompts, 75% of the last right",
      ],
    )

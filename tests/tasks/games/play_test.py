"""Tests of what compiles and plays games, in the worker that it is made for."""

import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.tasks import sandbox
from rljax.tasks.games import play, rules

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("ludax") is None,
  reason="needs ludax: pip install ludax==1.0.0 lark",
)

ROOT = pathlib.Path(__file__).resolve().parents[3]
ME = "tests.tasks.games_play_test"
BOARDS = (
  ("square_shape", 3),
  ("rectangle_shape", 2, 3),
  ("hex_rectangle_shape", 2, 3),
  ("hexagon_shape", 3),
)


# In a worker.


def call(name, *arguments):
  return globals()[name](*arguments)


def measure(text, seed=0, num_games=4, max_plies=30):
  return play.measure(text, seed, num_games, max_plies, 0)


def position(text, num_plies):
  return play.position(text, 0, num_plies, 0)


def tables_of_library(shape, *sizes):
  """The look-up tables as ludax computes them, and ours."""
  # A second copy of the module, which nobody has changed.
  spec = importlib.util.find_spec("ludax.utils")
  utils = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(utils)
  info = importlib.import_module("ludax.game_info").GameInfo()
  info.board_shape = shape
  if shape == "hexagon_shape":
    (info.hex_diameter,) = sizes
    info.board_dims = (sizes[0], 2 * sizes[0] - 1)
    info.board_size = 1 + 3 * (sizes[0] // 2) * (sizes[0] // 2 + 1)
  else:
    info.board_dims = sizes if len(sizes) == 2 else sizes * 2
    info.board_size = info.board_dims[0] * info.board_dims[1]
  changed = importlib.import_module("ludax.utils")
  names = ("_get_adjacency_lookup", "_get_slide_lookup")
  pairs = [
    (getattr(utils, name)(info), getattr(changed, name)(info)) for name in names
  ]
  for n, orientation in ((1, "any"), (3, "any"), (2, "diagonal")):
    pairs.append(
      (
        utils._get_line_indices(info, n, orientation),
        changed._get_line_indices(info, n, orientation),
      )
    )
  return [
    (np.asarray(theirs), np.asarray(ours), str(theirs.dtype), str(ours.dtype))
    for theirs, ours in pairs
  ]


def measure_by_steps(text, seed, num_games, max_plies):
  """As `measure`, one call of the library's own step after the other."""
  jax = importlib.import_module("jax")
  env = play._environment(text)
  rng = np.random.default_rng(seed)
  numbers = rng.integers(2**31, size=(max_plies, num_games), dtype=np.int32)
  step = jax.jit(jax.vmap(env.step))
  state = jax.tree.map(
    lambda x: np.broadcast_to(x, (num_games, *np.shape(x))),
    jax.jit(env.init)(jax.random.key(0)),
  )
  played = {
    name: np.zeros(num_games, int) for name in ("plies", "decisions", "moves")
  }
  stuck = np.zeros(num_games, bool)
  for row in numbers:
    over = np.asarray(state.terminated) | stuck
    mask = np.array(state.legal_action_mask)
    num = np.where(over, 0, mask.sum(-1))
    stuck |= ~over & (num == 0)
    played["plies"] += num > 0
    played["decisions"] += num > 1
    played["moves"] += num
    actions = [
      np.flatnonzero(m)[r % n] if n else 0
      for m, r, n in zip(mask, row, num, strict=True)
    ]
    state = step(state, np.array(actions, np.int16))
  return play._summary(
    played
    | {
      "stuck": stuck,
      "terminated": np.asarray(state.terminated) & ~stuck,
      "winners": np.asarray(state.winners),
    }
  )


def wins_by_rewards(text, num_games):
  """Shares of first and second, from rewards latched at each game's end."""
  jax = importlib.import_module("jax")
  env = play._environment(text)
  rng = np.random.default_rng(1)
  step = jax.jit(jax.vmap(env.step))
  state = jax.tree.map(
    lambda x: np.broadcast_to(x, (num_games, *np.shape(x))), env.init(None)
  )
  won = np.zeros((num_games, 2), bool)
  while not (over := np.asarray(state.terminated)).all():
    mask = np.asarray(state.legal_action_mask)
    draws = rng.random(mask.shape) * mask
    state = step(state, draws.argmax(-1).astype(np.int16))
    ends = ~over & np.asarray(state.terminated)
    won[ends] = np.asarray(state.rewards)[ends] > 0
  winners = np.asarray(state.winners)
  by_winners = np.stack(
    [(winners == pair).all(-1) for pair in ([1, 0], [0, 1])], -1
  )
  return won.mean(0), by_winners.mean(0)


def construct(text):
  play._environment(text)


def environment():
  names = ("os", "jax")
  os, jax = map(importlib.import_module, names)
  return os.environ["XLA_FLAGS"], [d.platform for d in jax.devices()]


def _pool(**options):
  return sandbox.Pool(
    f"{ME}:call",
    setup="rljax.tasks.games.play:set_up",
    **({"timeout": 300.0, "max_memory_bytes": None} | options),
  )


@pytest.mark.slow
class GamePlayTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.pool = _pool()
    cls.addClassCleanup(cls.pool.close)
    cls.games = rules.shipped()

  def _ask(self, *items):
    outcomes = self.pool.map(items)
    for item, outcome in zip(items, outcomes, strict=True):
      self.assertIsNone(outcome.failure, item)
    return [outcome.value for outcome in outcomes]

  def test_tables_are_those_of_the_library(self):
    found = self._ask(*[("tables_of_library", *board) for board in BOARDS])
    for board, tables in zip(BOARDS, found, strict=True):
      for theirs, ours, their_type, our_type in tables:
        np.testing.assert_array_equal(ours, theirs, str(board))
        self.assertEqual(our_type, their_type)

  def test_a_worker_has_its_own_settings(self):
    ((flags, platforms),) = self._ask(("environment",))
    self.assertNotIn("device_count", flags)  # Eight, in this process.
    self.assertEqual(platforms, ["cpu"])

  def test_known_win_rates_of_tic_tac_toe(self):
    text = self.games["tic_tac_toe"]
    played, rewards = self._ask(
      ("measure", text, 0, 10_000, 20), ("wins_by_rewards", text, 10_000)
    )
    found = [played["first"], played["second"]]
    np.testing.assert_allclose(found, [0.585, 0.288], atol=0.02)
    self.assertEqual(played["timeouts"] + played["stuck"], 0)
    by_rewards, by_winners = rewards
    np.testing.assert_array_equal(by_rewards, by_winners)
    np.testing.assert_allclose(by_rewards, found, atol=0.02)
    # Nine choices, then eight, ...: 7.6 plies of them.
    self.assertBetween(played["plies"], 7.5, 7.8)
    self.assertBetween(played["branching"], 5, 6)
    # The ninth ply is no choice.
    self.assertBetween(played["decisions"], 0.9, 0.99)

  @parameterized.parameters(
    # Passes, flips and scores; games that are stuck; two phases, captures.
    ("reversi", 70),
    ("wolf_and_sheep", 60),
    ("pente", 20),
  )
  def test_plays_as_the_library_does(self, name, max_plies):
    text = self.games[name].replace("(square 19)", "(square 9)")
    text = text.replace("(no_legal_actions)", "(full_board)")
    ours, theirs = self._ask(
      ("measure", text, 3, 16, max_plies),
      ("measure_by_steps", text, 3, 16, max_plies),
    )
    self.assertEqual(ours, theirs)
    self.assertGreater(ours["plies"], 5)

  def test_names_of_pieces_do_not_run_out(self):
    text = self.games["tic_tac_toe"]
    # Fails at the sixth where shapes are not given back.
    self._ask(
      *[("construct", text.replace("token", f"t{i}")) for i in range(20)]
    )

  @parameterized.parameters(
    ('(line "token" 3)', '(line "stone" 3)', "construct_error", "SyntaxError"),
    ("(full_board)", '(exists (region "x"))', "construct_error", "SyntaxError"),
    (
      "(full_board)",
      "(exists (edge forward))",
      "construct_error",
      "IndexError",
    ),
    ("both))", 'both) ("token" P1))', "construct_error", "SyntaxError"),
    (
      "both))",
      "both) " + " ".join(f'("{c}" both)' for c in "abcde") + ")",
      "construct_error",
      "ValueError",
    ),
    ("full_board", "full_bord", "construct_error", "UnexpectedCharacters"),
    ("(draw)))))", "(draw)))", "construct_error", "UnexpectedEOF"),
    (
      "(full_board)",
      "(>= (score mover) 1)",
      "trace_error",
      "AttributeError",
    ),
    ("(full_board)", "(passed both)", "trace_error", "AttributeError"),
    ("(full_board)", "(exists (promoted))", "trace_error", "AttributeError"),
    # Nobody complains.
    ("(players 2)", "(players 3)", "played", None),
    ('"token" 3', '"token" 9', "played", None),
  )
  def test_errors(self, old, new, stage, error):
    text = self.games["tic_tac_toe"]
    self.assertIn(old, text)
    (found,) = self._ask(("measure", text.replace(old, new)))
    self.assertEqual((found["stage"], found.get("error")), (stage, error))

  def test_stuck_and_stopped_games(self):
    text = self.games["tic_tac_toe"]
    stuck, stopped = self._ask(
      # The centre can be taken once.
      ("measure", text.replace("(empty)", "(and (empty) (center))")),
      ("measure", text, 0, 4, 3),
    )
    self.assertEqual(stuck["stuck"], 1)
    self.assertEqual(stuck["plies"], 1)
    self.assertEqual(stuck["first"] + stuck["second"] + stuck["timeouts"], 0)
    self.assertEqual(stopped["timeouts"], 1)
    self.assertEqual(stopped["plies"], 3)

  def test_positions(self):
    text = self.games["tic_tac_toe"]
    played, over, stuck, wrong = self._ask(
      ("position", text, 4),
      ("position", text, 100),
      ("position", text.replace("(empty)", "(and (empty) (center))"), 4),
      ("position", text.replace("(line", "(lin"), 4),
    )
    self.assertEqual((played["stage"], played["plies"]), ("played", 4))
    by = [site[1] for site in played["board"] if site]
    self.assertEqual(sorted(by), [0, 0, 1, 1])
    self.assertBetween(over["plies"], 5, 9)
    self.assertLen([site for site in over["board"] if site], over["plies"])
    # The one move that there is, and none that the rules do not allow.
    self.assertEqual(stuck["plies"], 1)
    self.assertEqual(stuck["board"], [[]] * 4 + [[0, 0]] + [[]] * 4)
    self.assertEqual(wrong["stage"], "construct_error")

  def test_out_of_memory_is_no_error_of_the_game(self):
    text = self.games["tic_tac_toe"].replace("(square 3)", "(square 75)")
    with _pool(max_memory_bytes=3 * 2**28) as pool:
      (outcome,) = pool.map([("measure", text, 0, 1, 2)])
    self.assertEqual(outcome.failure, "memory")
    (found,) = self._ask(("measure", text, 0, 1, 2))
    self.assertEqual(found["stage"], "played")

  def test_seconds_end_the_process(self):
    with _pool() as pool:
      (outcome,) = pool.map([("hang",)])
      self.assertEqual(outcome.failure, "died")


def hang():
  play._measure = _spin
  play.measure("", 0, 1, 1, 0.5)


def _spin(*unused):
  while True:
    pass


@pytest.mark.slow
class OtherProcessTest(absltest.TestCase):
  def test_same_text_and_seed_same_games(self):
    games = rules.shipped()
    items = [
      ("measure", games["connect_four"], seed, 16, 50) for seed in (0, 0, 1)
    ]
    found = []
    for _ in range(2):
      with _pool() as pool:
        found.append([outcome.value for outcome in pool.map(items)])
    self.assertEqual(found[0], found[1])
    self.assertEqual(found[0][0], found[0][1])
    self.assertNotEqual(found[0][0], found[0][2])

  def test_same_text_and_seed_same_reward(self):
    """Of a game of moves too, which is compiled by other options."""
    games = rules.shipped()
    moves = games["hop_through"].replace("(square 8)", "(square 5)")
    moves = moves.replace("(row 6) (row 7)", "(row 3) (row 4)")
    texts = [moves, games["tic_tac_toe"]]
    found = []
    for num_workers in (1, 2):
      done = subprocess.run(
        [sys.executable, "-c", _REWARDS, str(num_workers), *texts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
      )
      found.append(json.loads(done.stdout))
    self.assertEqual(*found)
    for reward, stage in zip(*found[0], strict=True):
      self.assertEqual(stage, "played")
      self.assertBetween(reward, 0.36, 0.99)


_REWARDS = """
import json, sys
from rljax.tasks import games
num_workers, *texts = sys.argv[1:]
rewards, parts = games.score_batch(
  [games.WHOLE] * 2, texts, num_games=16, num_workers=int(num_workers)
)
print(json.dumps([rewards, [part["stage"] for part in parts]]))
"""


if __name__ == "__main__":
  absltest.main()

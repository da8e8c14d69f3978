"""Compiles games of ludax and plays them at random, in a worker process.

The pool of `games` calls `set_up` in a new process, then `measure`. Neither is
for the process that trains: a description may take all time and memory, and
ludax keeps tables that all games of a process share. `set_up` imports the
libraries after it has made the settings that they read then.

Two faults of ludax 1.0.0 are worked around: shapes of pieces are never freed,
so that valid games fail after a few others; and a new environment spends
seconds on look-up tables that only depend on the board.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import itertools
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_CLEAR_EVERY = 25  # Games after which compiled programs are dropped.
_numbers = itertools.count(1)

# Steps on a board as (row, column), by direction. Hexagons have a site in every
# other column.
_SQUARE_STEPS = {
  "up_left": (-1, -1),
  "up": (-1, 0),
  "up_right": (-1, 1),
  "left": (0, -1),
  "right": (0, 1),
  "down_left": (1, -1),
  "down": (1, 0),
  "down_right": (1, 1),
}
_HEXAGON_STEPS = {
  "up_left": (-1, -1),
  "up_right": (-1, 1),
  "left": (0, -2),
  "right": (0, 2),
  "down_left": (1, -1),
  "down_right": (1, 1),
}
_HEX_RECTANGLE_STEPS = {
  "up_left": (-1, 0),
  "up_right": (-1, 1),
  "left": (0, -1),
  "right": (0, 1),
  "down_left": (1, -1),
  "down_right": (1, 0),
}


def set_up() -> None:
  """Prepares a new process: one thread, no accelerator, no old settings."""
  # The parent's settings are not for its workers, and might change what is
  # drawn.
  for name in list(os.environ):
    if name.startswith(("JAX_", "XLA_")):
      del os.environ[name]
  os.environ.update(
    JAX_PLATFORMS="cpu",
    # There is a process per core: one thread each.
    TF_CPP_MIN_LOG_LEVEL="3",  # It logs every slow compilation.
    NPROC="1",
    OMP_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    XLA_FLAGS=_XLA_FLAGS,
  )
  _libraries()
  # The first game waits for a second or two; warm up outside its limits.
  measure(_WARM_UP, seed=0, num_games=2, max_plies=2, seconds=0)


# A game is compiled for seconds and played for less.
_XLA_FLAGS = (
  "--xla_cpu_multi_thread_eigen=false --xla_cpu_parallel_codegen_split_count=1"
)
# It takes a quarter off the time of eight games of ludax, and no result moves.
# Later releases have no such flag, and end the process at it.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  _XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"

_WARM_UP = (
  '(game "game" (players 2) (equipment (board (square 3)) (pieces ("a" both)))'
  ' (rules (play (repeat (P1 P2) (place "a" (destination (empty))))) (end (if '
  '(line "a" 3) (mover win)))))'
)


def measure(
  text: str, seed: int, num_games: int, max_plies: int, seconds: float
) -> dict[str, Any]:
  """Compiles a game and plays it at random.

  All legal moves are equally likely. Integers are drawn, so that the same games
  are played on every machine.

  Args:
    text: description of a game; anything.
    seed: of the moves.
    num_games: how many games to play.
    max_plies: where a game is stopped.
    seconds: of processor time, after which this process ends itself; 0 for no
      limit. Wall-clock time would depend on the machine's load.

  Returns:
    A dict with "stage": "construct_error" or "trace_error", then with "error",
    the name of an exception; or "played", then with shares of the games:
      first, second: won by only one player.
      timeouts: stopped at `max_plies`.
      stuck: with a position without legal moves. ludax then executes an illegal
        one, so that these games do not count otherwise.
    and with
      plies: mean length of a game.
      decisions: share of plies with more than one legal move.
      branching: mean number of legal moves of a ply.
  """
  with _limits(seconds):
    return _measure(text, seed, num_games, max_plies)


def position(
  text: str, seed: int, num_plies: int, seconds: float
) -> dict[str, Any]:
  """Plays a game at random for a while, and returns where the pieces are.

  Args:
    text: description of a game; anything.
    seed: of the moves.
    num_plies: how many moves; fewer if the game is over or stuck by then.
    seconds: see `measure`.

  Returns:
    A dict with "stage": "construct_error" or "trace_error", then with "error",
    the name of an exception; or "played", then with
      plies: how many moves there were.
      board: by site [piece, player], both from 0, or [] for none.
  """
  with _limits(seconds):
    played = _played(text, seed, 1, num_plies, with_boards=True)
  if "stage" in played:
    return played
  return {
    "stage": "played",
    "plies": int(played["plies"][0]),
    "board": [
      next(([p, int(by)] for p, by in enumerate(site) if by >= 0), [])
      for site in played["board"][0].T  # [M, P]
    ],
  }


@contextlib.contextmanager
def _limits(seconds: float) -> Iterator[None]:
  # The sandbox may trace every call to count memory errors, which makes
  # compiling much slower. There are limits without it.
  sys.settrace(None)
  # Without a handler, the signal ends the process even during a long call into
  # the compiler.
  signal.setitimer(signal.ITIMER_PROF, seconds)
  try:
    yield
  except Exception as error:
    if _is_out_of_memory(error):
      raise MemoryError(str(error)) from error
    raise
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)


def _measure(
  text: str, seed: int, num_games: int, max_plies: int
) -> dict[str, Any]:
  played = _played(text, seed, num_games, max_plies)
  return played if "stage" in played else _summary(played)


def _played(
  text: str,
  seed: int,
  num_games: int,
  max_plies: int,
  with_boards: bool = False,
) -> dict[str, Any]:
  """Returns what `_playouts` gives, as arrays; or the stage that failed."""
  jax, _ = _libraries()
  if next(_numbers) % _CLEAR_EVERY == 0:
    jax.clear_caches()
  numbers = _numbers_of(seed, max_plies, num_games)
  stage = "construct_error"
  try:
    env = _environment(text)
    stage = "trace_error"
    playouts = _playouts(env, num_games, max_plies, with_boards)
    lowered = jax.jit(playouts).lower(numbers)
    compiled = lowered.compile(_compiler_options(env))
  except Exception as error:
    if _is_out_of_memory(error):
      raise
    return {"stage": stage, "error": _name(error)}
  return jax.device_get(compiled(numbers))


def _numbers_of(seed: int, max_plies: int, num_games: int) -> np.ndarray:
  # Drawn here, for less to compile. A remainder of 31 bits is almost uniform.
  return np.random.default_rng(seed).integers(
    2**31, size=(max_plies, num_games), dtype=np.int32
  )


def _name(error: Exception) -> str:
  return type(_cause(error)).__name__


def _cause(error: Exception) -> Exception:
  # The parser's visitors wrap the exception.
  return getattr(error, "orig_exc", error)


def _is_out_of_memory(error: Exception) -> bool:
  jax, _ = _libraries()
  cause = _cause(error)
  return isinstance(cause, MemoryError) or (
    # A text may hold any word, so that other errors are not searched for it.
    isinstance(cause, jax.errors.JaxRuntimeError)
    and "RESOURCE_EXHAUSTED" in str(cause)
  )


def _compiler_options(env: Any) -> dict[str, Any]:
  # Games in which pieces move look at all pairs of sites: unoptimized, they
  # take longer to play than to compile.
  moves = env.game_info.action_type != "action_to"
  return {} if moves else _fast_options()


@functools.cache
def _fast_options() -> dict[str, Any]:
  """Returns options for a short compilation that this compiler has."""
  jax, _ = _libraries()
  program = jax.jit(lambda x: x + 1).lower(np.int32(1))
  options = {}
  for name, value in (
    ("xla_backend_optimization_level", 0),
    ("xla_llvm_disable_expensive_passes", True),
  ):
    try:
      program.compile({name: value})
    except Exception:
      continue
    options[name] = value
  return options


def _start(env: Any) -> Any:
  """Returns the first position, but for its legal moves."""
  jax, _ = _libraries()
  jnp = jax.numpy
  state = env.game_state_cls(
    board=jnp.full((env.num_piece_types, env.board_size), -1, jnp.int8),
    legal_action_mask=jnp.ones(env.num_actions, bool),
    current_player=jnp.int8(0),
    phase_idx=jnp.int8(0),
    phase_step_count=jnp.int8(0),
    previous_actions=jnp.full(3, -1, jnp.int16),
  )
  state = env._initialize_board(state)
  state = state._replace(current_player=env._get_next_player(state))
  return env._update_info(state, -1)


def _move(env: Any, state: Any, action: Any) -> Any:
  """Returns the position after a move, but for its legal moves."""
  mover = state.current_player
  state = env._update_info(env._apply_action(state, action), action)
  phase, num_steps = env._get_phase_idx(state)
  state = state._replace(phase_idx=phase, phase_step_count=num_steps)
  state = state._replace(current_player=env._get_next_player(state))
  return env._apply_effects(state, mover)


def _step(env: Any, state: Any, action: Any, is_first: Any) -> tuple:
  """Plays a move and finds the next legal ones: `(state, winners, is_over)`.

  If `is_first`, the position stays and only gets its legal moves.
  """
  jax, _ = _libraries()
  jnp = jax.numpy
  mover = state.current_player
  state = jax.tree.map(
    lambda old, new: jnp.where(is_first, jnp.asarray(old, new.dtype), new),
    state,
    jax.tree.map(jnp.asarray, _move(env, state, action)),
  )
  mask = env._get_legal_action_mask(state).astype(bool)
  state = state._replace(legal_action_mask=mask)
  # The rules for the end mean the player who moved.
  winners, is_over = env._get_winner(state._replace(current_player=mover))
  return state, winners, is_over & ~is_first


def _playouts(
  env: Any, num_games: int, max_plies: int, with_boards: bool = False
) -> Any:
  """Returns a function of `[T, N]` random numbers that plays N games.

  Its results tell how they went; with boards also where their pieces are,
  `[N, P, M]`.

  It plays as `env.init` and `env.step` do. Those compute legal moves in two
  places, and handle illegal moves, which would all be compiled.
  """
  jax, _ = _libraries()
  jnp = jax.numpy
  step = functools.partial(_step, env)

  def playouts(numbers):
    # All games start alike, without chance.
    state = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (num_games, *jnp.shape(x))), _start(env)
    )
    zeros, no = jnp.zeros(num_games, jnp.int32), jnp.zeros(num_games, bool)
    played = {
      "plies": zeros,
      "decisions": zeros,
      "moves": zeros,
      "stuck": no,
      "terminated": no,
      "winners": jnp.full((num_games, 2), -1, jnp.int8),
    }

    def goes_on(carry):
      _, played, t = carry
      is_live = ~played["terminated"] & ~played["stuck"]
      return is_live.any() & (t < max_plies)

    def body(carry):
      state, played, t = carry
      is_first = t < 0
      mask = state.legal_action_mask  # [N, A]
      ranks = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
      num_legal = ranks[:, -1]
      is_live = ~played["terminated"] & ~played["stuck"] & ~is_first
      stuck = played["stuck"] | (is_live & (num_legal == 0))
      is_live &= num_legal > 0
      # The n-th of the legal moves. Floats, as in a categorical draw, may be
      # rounded differently on another machine.
      nth = numbers[t] % jnp.maximum(num_legal, 1)
      actions = jnp.argmax(ranks > nth[:, None], axis=-1).astype(jnp.int16)
      after, winners, is_over = jax.vmap(step, (0, 0, None))(
        state, actions, is_first
      )
      # Games that are over play on, unless their boards are asked for.
      if with_boards:
        keep = ~(is_live | is_first)
        after = jax.tree.map(
          lambda new, old: jnp.where(
            keep.reshape(-1, *(1,) * (new.ndim - 1)), old, new
          ),
          after,
          state,
        )
      state = after
      played = {
        "plies": played["plies"] + is_live,
        "decisions": played["decisions"] + (is_live & (num_legal > 1)),
        "moves": played["moves"] + jnp.where(is_live, num_legal, 0),
        "stuck": stuck,
        "terminated": played["terminated"] | (is_live & is_over),
        "winners": jnp.where(
          is_live[:, None], winners.astype(jnp.int8), played["winners"]
        ),
      }
      return state, played, t + 1

    state, played, _ = jax.lax.while_loop(goes_on, body, (state, played, -1))
    return played | ({"board": state.board} if with_boards else {})

  return playouts


def _summary(played: dict[str, np.ndarray]) -> dict[str, Any]:
  counted = played["terminated"] & ~played["stuck"]
  # Other pairs mean a draw, that both win, or that both lose.
  first = counted & (played["winners"] == [1, 0]).all(-1)
  second = counted & (played["winners"] == [0, 1]).all(-1)
  timeouts = ~played["terminated"] & ~played["stuck"]
  plies = max(int(played["plies"].sum()), 1)
  return {
    "stage": "played",
    "first": float(first.mean()),
    "second": float(second.mean()),
    "timeouts": float(timeouts.mean()),
    "stuck": float(played["stuck"].mean()),
    "plies": float(played["plies"].mean()),
    "decisions": int(played["decisions"].sum()) / plies,
    "branching": int(played["moves"].sum()) / plies,
  }


# The compiler of ludax.


@functools.cache
def _libraries() -> tuple[Any, Any]:
  """Returns jax and ludax, which is changed as needed."""
  # No import statements: tasks must not import jax in the process that trains.
  jax = importlib.import_module("jax")
  ludax = importlib.import_module("ludax")
  environment = importlib.import_module("ludax.environment")
  utils = importlib.import_module("ludax.utils")
  # One parser for all games, and one table for all games on a board.
  environment.Lark = functools.cache(environment.Lark)
  utils._get_adjacency_lookup = _adjacency
  utils._get_slide_lookup = _slides
  utils._get_line_indices = _in_numpy(utils._get_line_indices)
  return jax, ludax


def _environment(text: str) -> Any:
  _, ludax = _libraries()
  rendering = importlib.import_module("ludax.game_info").RenderingInfo
  # One dictionary for all games of the process, with only five shapes.
  rendering.piece_shape_mapping.clear()
  rendering.color_mapping.clear()
  rendering.color_mapping.update(P1="white", P2="black")
  return ludax.LudaxEnvironment(game_str=text)


def _in_numpy(function: types.FunctionType) -> Callable[..., Any]:
  """Returns a function of ludax with numpy in place of jax.

  It makes thousands of small arrays, for each of which jax needs a millisecond.
  """
  asarray = function.__globals__["jnp"].asarray
  fast = types.FunctionType(
    function.__code__, function.__globals__ | {"jnp": np}, function.__name__
  )
  return lambda *arguments: asarray(fast(*arguments))


def _adjacency(game_info: Any) -> Any:
  jax, _ = _libraries()
  return jax.numpy.asarray(
    adjacency_table(str(game_info.board_shape), tuple(game_info.board_dims))
  )


def _slides(game_info: Any) -> Any:
  jax, _ = _libraries()
  return jax.numpy.asarray(
    slide_table(str(game_info.board_shape), tuple(game_info.board_dims))
  )


@functools.lru_cache(64)
def adjacency_table(shape: str, dims: tuple[int, int]) -> np.ndarray:
  """Returns which sites are neighbours, by direction.

  Args:
    shape: of the board, as in the grammar: "square_shape", ...
    dims: rows and columns of the array that the board is drawn in.

  Returns:
    `[D, M, M]` int8 for D directions and M sites: 1 at [d, i, j] if a step in
    direction d leads from j to i.
  """
  sites, steps = _sites(shape, dims), _steps(shape)
  index = {site: i for i, site in enumerate(sites)}
  table = np.zeros((len(steps), len(sites), len(sites)), np.int8)
  for d, (down, right) in enumerate(steps.values()):
    for i, (row, column) in enumerate(sites):
      j = index.get((row - down, column - right))
      if j is not None:
        table[d, i, j] = 1
  return table


@functools.lru_cache(64)
def slide_table(shape: str, dims: tuple[int, int]) -> np.ndarray:
  """Returns the sites in a line with a site, by direction.

  Args:
    shape: see `adjacency_table`.
    dims: see `adjacency_table`.

  Returns:
    `[D, M, N]` int16 for lines of at most N sites: the site itself, then the
    others in the order of a slide, then M + 1.
  """
  sites, steps = _sites(shape, dims), _steps(shape)
  index = {site: i for i, site in enumerate(sites)}
  longest = dims[0] if shape == "hexagon_shape" else max(dims)
  table = np.full((len(steps), len(sites), longest), len(sites) + 1, np.int16)
  for d, (down, right) in enumerate(steps.values()):
    for i, (row, column) in enumerate(sites):
      for n in range(longest):
        j = index.get((row + n * down, column + n * right))
        if j is None:
          break
        table[d, i, n] = j
  return table


def _sites(shape: str, dims: tuple[int, int]) -> list[tuple[int, int]]:
  rows, columns = dims
  if shape == "hexagon_shape":
    return [
      (row, column)
      for row in range(rows)
      for margin in [abs(row - rows // 2)]
      for column in range(margin, columns - margin, 2)
    ]
  return [(row, column) for row in range(rows) for column in range(columns)]


def _steps(shape: str) -> dict[str, tuple[int, int]]:
  # Their order is that of the channels in ludax.
  if shape == "hexagon_shape":
    return _HEXAGON_STEPS
  if shape == "hex_rectangle_shape":
    return _HEX_RECTANGLE_STEPS
  return _SQUARE_STEPS

"""One run of a script: its folder, mesh, state, logs and signals.

A script opens its run, makes its models and functions, restores its state, and
trains inside of `run.training`:

  run = runs.start(FLAGS, total_steps=FLAGS.steps)
  ...
  state = run.restore({"policy": params}, rules, optimizer=transform)
  update = run.compile(update, returns_state=True)
  with run.training(model, tokenizer, {"policy": loaded.params}):
    for step in run.steps(freeze=[update]):
      state, metrics = update(state, batch_of(step))
      run.log(step, metrics)
      run.save(step + 1, state)
  return run.exit_status

What a step does, and in which order, stays in the script.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
from absl import flags, logging

from rljax.distributed import compiled, meshes, planning, processes
from rljax.evaluation import curves, token_pages
from rljax.evaluation import metrics as metrics_lib
from rljax.generation import responders, responses
from rljax.models import hf, lora
from rljax.storage import calls, checkpoint, locks, mirrors, signals, workdirs
from rljax.storage import rows as rows_lib
from rljax.training import (
  adapted,
  announce,
  best,
  guards,
  learner_checks,
  logs,
  longer,
  microbatch,
  origins,
  precision,
  preflight,
  trackers,
)

Tree = Any


def start(
  values: flags.FlagValues,
  *,
  total_steps: int | None = None,
  trains: bool = True,
) -> "Run":
  """Opens the run that the flags of a script describe.

  Joins the processes, sets the compilation cache, takes the workdir with its
  lock, holds the flags against those that the run there began with, and makes
  the mesh. Reads flags that `cli.define_run` defines. Flags that may differ
  when a run is started again carry the attribute `may_change`, those that may
  only grow `may_grow`; see `longer.check`.

  Args:
    values: the absl flags of the script.
    total_steps: steps of the whole run; may be set later, as
      `run.total_steps`.
    trains: whether it trains a model. A script that only measures, and files
      its results by `Run.reporting`, does not take the workdir of one.

  Returns:
    The run. Its flags are filed once training begins, when all else that may
    be wrong with them is known.

  Raises:
    ValueError: if the workdir cannot be written to, belongs to a process that
      is still running, is not seen by all processes, or holds a run with other
      flags or of another kind; if the flags of several processes differ; or if
      the mesh does not fit the devices.
  """
  processes.divide_cpu("cpu_devices" in values and values.cpu_devices)
  processes.join()
  if not values["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax has much to say.
  if values.compilation_cache:
    cache = os.path.expanduser(values.compilation_cache)
    jax.config.update("jax_compilation_cache_dir", cache)
  if "matmul_precision" in values:
    precision.apply(values.matmul_precision, values.dtype)
  own = values.get_key_flags_for_module(sys.argv[0])
  in_force = {flag.name: flag.value for flag in own}
  shown = mirrors.shown(values.workdir)
  if "workdir" in in_force:  # The URL, of one in a bucket.
    in_force["workdir"] = shown
  may_change = {f.name for f in own if getattr(f, "may_change", False)}
  growing = {f.name: f.may_grow for f in own if getattr(f, "may_grow", "")}
  # The first that they tell each other, now that the cache is known.
  folder = os.path.realpath(values.workdir)
  processes.check_same(
    "The flags of the processes", in_force | {"the folder of --workdir": folder}
  )
  workdirs.prepare(values.workdir)
  if mirrors.of(values.workdir) is None:
    processes.check_shared(values.workdir)
  if not trains and checkpoint.holds_run(values.workdir):
    raise ValueError(
      f"--workdir={shown} holds a training run, whose files this "
      "script would replace; choose another."
    )
  lock = locks.take(values.workdir) if processes.is_first() else None
  may_change |= growing.keys()
  workdirs.check_flags(values.workdir, in_force, may_change)
  longer.check(values, growing)
  mesh = meshes.make(values.mesh)
  if trains and processes.is_first():
    print("\n".join(announce.lines(values, mesh)), flush=True)
  return Run(values, in_force, may_change, mesh, lock, total_steps)


class Run:
  """An open run; made by `start`.

  Attributes:
    mesh: the devices, from `meshes.make`.
    rows_sharding: how the rows of a batch lie on them.
    workdir: folder of the run.
    total_steps: steps of the whole run.
    first_step: where this start begins; known after `restore`.
    meta: what the script has saved beside its arrays, by `save`.
    is_complete: whether all steps are done, rather than stopped by a signal.
  """

  def __init__(self, values, in_force, may_change, mesh, lock, total_steps):
    """See `start`."""
    self.mesh = mesh
    self.rows_sharding = meshes.batch_sharding(mesh)
    self.workdir = values.workdir
    self.total_steps = total_steps
    self.first_step = 0
    self.meta: dict[str, Any] = {}
    self.is_complete = False
    self._values, self._in_force = values, in_force
    self._keeps_best = self._flag("keep_best", False)
    self._may_change = may_change
    self._saved_every = longer.filed(values.workdir).get("save_every", 0)
    self._lock = lock  # Held as long as this object lives.
    self._notes: list[str] = []
    self._log = self._checkpoints = self._signals = None
    self._best: best.Best | None = None
    self._state_shardings = None
    self._stopped = self._lacks_page = self._is_overdue = False
    self._latest: tuple[Any, ...] | None = None  # What `save` was last given.
    self._memory: dict[str, Tree] = {}
    self._frozen = adapted.Frozen()  # Shared by the parts of a run.
    self._has_shown: list[bool] = []  # Of programs; shared with parts.
    self._watch = self._new_watch()
    self._is_checked: list[bool] = []  # Shared by the parts of a run.
    self._has_stepped: list[bool] = []  # Likewise.

  def _new_watch(self):
    """What looks at the metrics, by the flags that the script has."""
    mode = self._flag("preflight", "off")
    return guards.Watch(
      self.note,
      max_skipped=self._flag("max_skipped", 0),
      is_strict=mode == "strict",
    )

  def tolerance(self, params: Tree = None) -> precision.Tolerance:
    """Returns what rounding may do to passes of these parameters."""
    return precision.of_flags(self._values, params)

  # State.

  def place(self, tree: Tree, rules: meshes.Rules) -> Tree:
    """Puts the arrays of a tree on the mesh, by `meshes.shardings`.

    Frozen weights that adapters are beside lie there once; see `adapted`.
    """
    return self._frozen.place(tree, meshes.shardings(tree, rules, self.mesh))

  def place_model(self, loaded: hf.LanguageModel) -> hf.LanguageModel:
    """Puts the parameters of a loaded model on the mesh, by its own rules."""
    rules = hf.partition_rules(loaded.model, self.mesh)
    params = self.place(loaded.params, rules)
    if (bad := guards.first_not_finite(params)) is not None:
      raise ValueError(
        f"{loaded.source} has weights that are not finite: {bad}."
      )
    return dataclasses.replace(loaded, params=params)

  def shard(self, batch: Tree) -> Tree:
    """Splits the rows of a batch over the devices, by `meshes.shard_batch`."""
    return meshes.shard_batch(batch, self.mesh)

  def restore(
    self,
    params: Tree,
    rules: meshes.Rules,
    *,
    optimizer: optax.GradientTransformation,
    **more: Tree,
  ) -> dict[str, Tree]:
    """Makes and places a fresh state, or loads that of the last checkpoint.

    Sets `first_step`, `meta` and `best`.

    Args:
      params: what is trained, as it begins, by the names of its models: numpy
        arrays, or copies, as a program that takes the state may delete it.
      rules: of `meshes.shardings`.
      optimizer: of all of `params`.
      **more: other arrays of the state.

    Returns:
      `{"params", "optimizer", **more}` on the mesh, to go on from.

    Raises:
      ValueError: if the checkpoint is of another model or optimizer, or of a
        later step than the last one.
    """
    self.expect(params, rules, optimizer=optimizer, **more)
    shardings = self._state_shardings
    params = self._frozen.place(params, shardings["params"])
    if self._flag("preflight", "off") != "off":
      self._watch.tolerance = self.tolerance(params)
    # Made where it will lie: whole, it need not fit a device or the host.
    start = compiled.Compiled(
      "optimizer", optimizer.init, out_shardings=shardings["optimizer"]
    )
    state = {"params": params, "optimizer": start(params)}
    for name, tree in more.items():
      state[name] = meshes.place(tree, shardings[name])
    shape = lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding
    )
    self._memory = jax.tree.map(shape, state)
    if self._checkpoints is None:  # A part has its own already.
      self._checkpoints = checkpoint.Checkpoints(self.workdir)
    if restored := self._checkpoints.restore_latest(lora.learnt(state)):
      self.first_step, saved, self.meta = restored
      state = lora.with_learnt(state, saved)
      self._watch.restore(self.meta)
    longer.check_done(self.first_step, self.total_steps, self.workdir)
    if (bad := guards.first_not_finite(state)) is not None:
      raise ValueError(
        f"The run in {self.workdir} would start from numbers that are not "
        f"finite: {bad}. The model of the flags, or the checkpoint, is damaged."
      )
    if self._keeps_best:
      self._best = best.Best(os.path.join(self.workdir, "best"), self.note)
      self._best.restore(
        self.meta.get("best"),
        self.first_step,
        self.total_steps or 0,
        keep=bool(self._checkpoints.unreadable),
      )
    for checkpoints in self._all_checkpoints:
      for message in checkpoints.messages:
        self.note(message)
    return state

  def expect(
    self,
    params: Tree,
    rules: meshes.Rules,
    *,
    optimizer: optax.GradientTransformation,
    **more: Tree,
  ) -> None:
    """Says what `restore` will return, so that `compile` may come before it.

    Such a program is shared by the parts of a run, each of which restores a
    state of its own.

    Args:
      params: as for `restore`, likewise `rules`, `optimizer` and `more`.
    """
    make = lambda params: {
      "params": params,
      "optimizer": optimizer.init(params),
      **more,
    }
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    state = jax.eval_shape(make, jax.tree.map(like, params))
    self._state_shardings = meshes.shardings(state, rules, self.mesh)

  def compile(
    self,
    function: Callable[..., Any],
    *,
    name: str | None = None,
    returns_state: bool = False,
    **jit_options: Any,
  ) -> compiled.Compiled:
    """Jits a function that must not compile again once it is warm.

    Args:
      function: of arrays.
      name: shown in tables and errors; by default the function's own.
      returns_state: True for `(state, ...) -> (state, others)`, after
        `restore` or `expect`: the state is donated, and stays where it lies.
      **jit_options: of `jax.jit`.
    """
    name = name or function.__name__
    if returns_state and lora.split(self._state_shardings)[1] is not None:
      return adapted.Program(
        name, function, self._state_shardings, **jit_options
      )
    if returns_state:
      jit_options = {
        "donate_argnums": 0,
        "out_shardings": (self._state_shardings, None),
        **jit_options,
      }
    return compiled.Compiled(name, function, **jit_options)

  def keys(self, step: int, num: int = 2) -> jax.Array:
    """Returns the random keys of a step: they depend on --seed and the step."""
    key = jax.random.fold_in(jax.random.key(self._values.seed), step)
    return jax.random.split(key, num)

  # The loop.

  @contextlib.contextmanager
  def signals(self) -> Iterator["Run"]:
    """Catches SIGTERM and SIGINT, in the work before training too.

    Inside, `should_stop` tells of a signal, and `signals.Stopped` ends the
    block: `is_stopped` is then True, and everything that was written stays.
    """
    with signals.Preemption(self._may_end) as self._signals:
      try:
        yield self
      except signals.Stopped:
        self._stopped = True
        text = "Stopped by a signal; everything so far is saved."
        if self._log is not None:
          self._log.note(text)
        elif processes.is_first():
          print(text, flush=True)

  def _may_end(self) -> bool:
    """Whether this process may end while it compiles: no step was made yet."""
    is_alone = jax.process_count() == 1  # Others would wait for it.
    return is_alone and compiled.is_compiling() and not self._has_stepped

  def should_stop(self) -> bool:
    """Returns whether a signal asked for the end. All processes call it."""
    return self._signals.should_stop()

  def check_signals(self) -> None:
    """Ends the block of `signals` if a signal asked for the end."""
    if self.should_stop():
      raise signals.Stopped

  def progress(
    self, name: str, num_prompts: int
  ) -> Callable[[int, list[dict[str, Any]]], None]:
    """Makes what `responders.collect` calls after a batch, within `signals`.

    Args:
      name: of what is drawn.
      num_prompts: that are answered.

    Returns:
      A function that shows how far it is, and then calls `check_signals`.
    """
    shown = responders.Progress(name, num_prompts)

    def progress(done, rows):
      shown(done, rows)
      self.check_signals()

    return progress

  def file(
    self,
    starts_from: Mapping[str, Tree],
    digests: Mapping[str, str] | None = None,
  ) -> None:
    """Files flags and models, once all else that may be wrong is known.

    Args:
      starts_from: see `training`.
      digests: see `check_models`.

    Raises:
      ValueError: if another start has filed other flags or weights.
    """
    origins.check_models(self.workdir, starts_from, digests)
    self.file_flags()

  @contextlib.contextmanager
  def part(
    self,
    folder: str,
    model: Any,
    tokenizer: Any,
    *,
    total_steps: int,
    keep: int = 1,
  ) -> Iterator["Run"]:
    """Opens a run inside of this one, such as one fit of several.

    It has steps and checkpoints of its own, and no logs. It lies within
    `signals`: a signal ends the block of those, once the part is saved.

    Args:
      folder: below the workdir; it becomes one that flags which name models
        take.
      model: whose config is written there.
      tokenizer: likewise.
      total_steps: of the part.
      keep: how many of its checkpoints stay.

    Yields:
      A run to `restore`, count `steps` and `save`.
    """
    mirrors.check_one_disk(self.workdir)
    part = copy.copy(self)
    part.workdir = os.path.join(self.workdir, folder)
    part.total_steps = total_steps
    part.first_step, part.meta = 0, {}
    part._latest = None
    part.is_complete = part._stopped = False
    part._checkpoints = checkpoint.Checkpoints(part.workdir, keep=keep)
    part._best, part._keeps_best = None, False
    part._watch, part._is_overdue = part._new_watch(), False
    with part._checkpoints:
      yield part
    if part.is_stopped:
      raise signals.Stopped
    hf.save_config(os.path.join(part.workdir, "model"), model, tokenizer)

  @contextlib.contextmanager
  def training(
    self,
    model: Any,
    tokenizer: Any,
    starts_from: Mapping[str, Tree],
    columns: Sequence[str] = (),
    digests: Mapping[str, str] | None = None,
  ) -> Iterator["Run"]:
    """Files flags and models, and opens logs, checkpoints and signals.

    `signals.Stopped` ends the block, as it does that of `signals`.

    Args:
      model: whose config is written to `<workdir>/model`.
      tokenizer: likewise.
      starts_from: name of a flag -> parameters that the run starts from; None
        for none. A later start with other weights is refused.
      columns: metrics that the progress line shows.
      digests: what else it starts from, see `check_models`.

    Raises:
      ValueError: if another start has filed other flags or weights.
    """
    self.file(starts_from, digests)
    folders = [self.workdir] + ([self._best.folder] if self._best else [])
    for folder in folders:
      hf.save_config(os.path.join(folder, "model"), model, tokenizer)
    with contextlib.ExitStack() as stack:
      self.open_log(stack, columns)
      for kept in self._all_checkpoints:
        stack.enter_context(kept)
      stack.enter_context(self.signals())
      try:
        yield self
      except (signals.Stopped, calls.CallError) as error:
        # The next step asked a function of the user's, for an answer that
        # does not come: those before it are not lost.
        self._save_latest()
        self._file_answers(error.rows)
        raise

  def file_flags(self) -> None:
    """Files the flags, which later starts are held against.

    `file` and `reporting` do so. A script that trains nothing calls it where it
    leaves something to go on with before it reports.
    """
    workdirs.write_flags(self.workdir, self._in_force, self._may_change)

  @contextlib.contextmanager
  def reporting(self) -> Iterator["Run"]:
    """Files flags and opens logs, for a script that trains nothing.

    What an earlier start wrote to `samples.jsonl` is dropped.
    """
    self.file_flags()
    if processes.is_first():
      pathlib.Path(self.workdir, "samples.jsonl").unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
      self.open_log(stack)
      yield self

  def open_log(
    self, stack: contextlib.ExitStack, columns: Sequence[str] = ()
  ) -> None:
    """Opens the logs alone, for a script that files its results by itself.

    Without the flag --wandb_project, see `cli.define_run`, the script logs no
    metrics: it has no curves, and nothing for TensorBoard.

    Args:
      stack: closes them.
      columns: metrics that the progress line shows.
    """
    has_metrics = "wandb_project" in self._values
    repeats = None  # A save may be under way when the next one is due.
    if "save_every" in self._values:
      repeats = 2 * max(self._values.save_every, self._saved_every)
    damaged = self._checkpoints is not None and self._checkpoints.unreadable
    self._log = stack.enter_context(
      logs.Logs(
        self.workdir,
        total_steps=self.total_steps or 1,
        first_step=self.first_step,
        columns=columns,
        wandb_project=has_metrics and self._values.wandb_project,
        tensorboard=has_metrics,
        num_rows=self.meta.get("rows"),
        repeats=repeats,
        keep=bool(damaged),
        about=trackers.About(
          self._flag("run_name", ""), self._flag("run_tags", ()), self._in_force
        ),
      )
    )
    if has_metrics and not planning.current():
      draw = functools.partial(
        curves.curves,
        panels=curves.PANELS,
        title=self._flag("run_name", "")
        or pathlib.Path(self.workdir).resolve().name,
      )
      self._log.curves(draw)
    for text in self._notes:
      self._log.note(text)
    self._notes = []

  def steps(self, freeze: Iterable[Any] = ()) -> Iterator[int]:
    """Counts the steps that are left, until the end or a signal.

    Args:
      freeze: programs that from the second step on must not compile again.

    Yields:
      Each step, from `first_step`. The loop calls `save` in every one of them.
    """
    plan, stop = planning.current(), self.total_steps
    if plan is not None:
      stop = min(stop, self.first_step + planning.STEPS)
    for step in range(self.first_step, stop):
      if plan is not None:
        plan.begins(step)
      yield step
      freeze = list(freeze)
      if step == self.first_step:
        self._show_programs(freeze)
      if self._stopped:
        self.note(f"Stopped by a signal after step {step + 1}; all is saved.")
        return
      for program in freeze:
        program.freeze()
    self.is_complete = plan is None

  def _show_programs(self, programs: Sequence[Any]) -> None:
    """Shows once what was compiled, and the memory that a device has of it."""
    is_online = "samples_every" in self._values
    if is_online and self._values.preflight != "off":
      self._has_shown.append(True)  # `preflight.run` has done so.
    if programs and not self._has_shown:
      found = (getattr(x, "program", x) for x in programs)
      rows = [row for x in found for row in getattr(x, "compilations", ())]
      preflight.show([], rows, self._memory)
      self._has_shown.append(True)

  @property
  def _about(self) -> str:
    """What the prompts are of: the data, or the task."""
    return self._flag("data") or self._flag("task") or self.workdir

  def _flag(self, name: str, default: Any = None) -> Any:
    """Returns a flag that not every script has."""
    return self._values[name].value if name in self._values else default

  @property
  def is_stopped(self) -> bool:
    """Whether a signal has ended the work."""
    return self._stopped

  @property
  def exit_status(self) -> int:
    """What the script returns: 0, or 130 after an interrupt."""
    return self._signals.exit_status if self._stopped else 0

  def save(self, done: int, state: Tree, **meta: Any) -> None:
    """Saves every --save_every steps, at the end, and after a signal.

    While updates are skipped, which are not finite, a save waits for the first
    one that is not.

    Args:
      done: number of finished steps.
      state: as `restore` returned it.
      **meta: what is not an array; comes back in `meta`.

    Raises:
      guards.NotFinite: if the state is not, or the last steps of a run have
        taught it nothing.
    """
    if planning.current():
      return
    self._has_stepped[:] = [True]
    stop, is_last = self.should_stop(), done == self.total_steps
    is_due = done % self._values.save_every == 0 or is_last or self._is_overdue
    rows = {} if self._log is None else dict(self._log.num_rows)
    about = {"step": done, "best": self.best, "rows": rows}
    state = lora.learnt(state)
    self._latest = (done, state, {**about, **self._watch.state, **meta})
    self._checkpoints.check()
    if is_last:
      self._watch.check_end(done - 1)
    self._is_overdue = is_due and bool(self._watch.skipping_since)
    if stop or is_last or (is_due and not self._is_overdue):
      what = f"The state after step {done} is not saved"
      guards.check_finite(state, what)
      self._checkpoints.save(*self._latest)
    self._stopped = stop and done < self.total_steps

  def _save_latest(self):
    """Saves the state of the last step, for work that ends within the next."""
    if self._latest is None or jax.process_count() > 1:
      return
    leaves = jax.tree.leaves(self._latest[1])
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in leaves):
      return
    if guards.first_not_finite(self._latest[1]) is None:
      self._checkpoints.save(*self._latest)

  def _file_answers(self, rows):
    """Files what a batch asked and was answered before it failed."""
    if rows and processes.is_first():
      answered = rows_lib.Appender(os.path.join(self.workdir, "answered.jsonl"))
      strict = (logs.strict(dict(row)) for row in rows)
      answered.write("".join(json.dumps(row) + "\n" for row in strict))
      answered.close()

  # The best.

  @property
  def best(self) -> dict[str, Any] | None:
    """The best evaluation so far, see `best.Best.found`; None of none."""
    return self._best and self._best.found

  def keep_best(self, step: int, value: float, params: Tree) -> None:
    """Keeps the parameters of the best evaluation, with --keep_best.

    The first evaluation, of what the run starts from, is to be beaten; if none
    does, the last parameters count as the best. A value that is not finite is
    no evaluation.

    Args:
      step: of the evaluation.
      value: the larger, the better.
      params: what is kept in `<workdir>/best`.

    Raises:
      guards.NotFinite: if parameters are not finite.
    """
    if self._best is not None and not planning.current():
      is_last = step == self.total_steps
      self._best.update(step, value, lora.learnt(params), is_last=is_last)

  # What is left for people to look at.

  def log(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes one row of metrics, and ends a run that they show to be lost."""
    self._log.write(step, metrics)
    self.watch(step, metrics)

  def check_learner(
    self,
    gradients: microbatch.Gradient,
    params: Tree,
    batch: Mapping[str, Any],
    more: Callable[..., tuple[Any, ...]] = lambda batch: (),
    **options: Any,
  ) -> None:
    """Checks, once, what a script learns from given texts; see --preflight.

    Args:
      gradients: of the script; see `learner_checks.check`, likewise the others.
      params: that it differentiates.
      batch: rows of an update; those of its first pass are looked at.
      more: maps a batch to further arguments of the gradient.
      **options: of `learner_checks.check`.

    Raises:
      preflight.Refused: if a check fails, with --preflight=strict.
    """
    num_rows = len(batch["prompt_ids"]) // gradients.num_parts
    num_own = num_rows // meshes.num_batch_shards(self.mesh)
    self._enforce(
      lambda: learner_checks.check(
        gradients,
        params,
        {name: x[:num_rows] for name, x in batch.items()},
        more=more,
        place=self.shard,
        tolerance=self.tolerance(params),
        **{
          "num_parts": preflight.smallest_divisor(num_own),
          "is_start": not self.first_step,
          **options,
        },
      )
    )

  def check_rows(
    self, function: Callable[..., Any], arrays: jax.Array, mask: jax.Array
  ) -> None:
    """Checks that a function reads rows by themselves, as `check_learner`."""
    self._enforce(
      lambda: learner_checks.check_rows(
        function, arrays, mask, tolerance=self.tolerance(None)
      )
    )

  def _enforce(self, check):
    mode = self._values.preflight
    if mode == "off" or self._is_checked or planning.current():
      return
    checks = check()
    preflight.show(checks)
    preflight.enforce(checks, mode)
    self._is_checked.append(True)

  def watch(self, step: int, metrics: Mapping[str, Any]) -> bool:
    """Ends a run that metrics show to be lost; see `guards.Watch.look`.

    Returns:
      Whether the last update was applied.
    """
    self._watch.look(step, metrics)
    return self._watch.skipping_since is None

  def note(self, text: str) -> None:
    """Prints a line above the progress line, or once that is there."""
    if self._log is None:
      self._notes.append(text)
    else:
      self._log.note(text)

  def skipped(self, messages: Sequence[str]) -> None:
    """Names rows that were left out, in `skipped.txt`, and counts them."""
    self._log.skipped(messages)

  def evaluated(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds what an evaluation said of each prompt to `evaluations.jsonl`.

    Args:
      step: of the evaluation.
      rows: of `answers.evaluate`.
    """
    names = ("prompt", "response", "reward", "finished")
    self._log.evaluations(
      step,
      [
        {name: row[name] for name in names if name in row}
        | {k: v for k, v in row["parts"].items() if k == "is_correct"}
        for row in rows
      ],
    )

  def has_read(self, *parts: Any) -> None:
    """Says what data holds, and names the rows of it that were left out.

    Args:
      *parts: with `notes`, lines, and `skipped`, messages; see `text.logged`.
    """
    for note in dict.fromkeys(note for part in parts for note in part.notes):
      self.note(note)
    if self._log is not None:
      self.skipped([message for part in parts for message in part.skipped])

  def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to `samples.jsonl`."""
    self._log.samples(step, rows)

  def show(
    self,
    step: int,
    samples: responses.Samples,
    weights: jax.Array | None = None,
    *,
    name: str = "advantage",
    num_in_all: int | None = None,
  ) -> None:
    """Shows samples every --samples_every steps: rows, histograms, a page.

    Args:
      step: that drew them.
      samples: N scored responses.
      weights: `[N, T]`, by which the page colours tokens; all processes pass
        them. The page shows the last step, too.
      name: of the weights.
      num_in_all: samples of the step, if not N.
    """
    is_due = step % self._values.samples_every == 0
    if is_due:
      self.samples(step, samples.records()[: self._values.samples_logged])
      histograms = {
        part: metrics_lib.answer_histogram(row[part] for row in samples.parts)
        for part in ("answer", "truth")
        if part in samples.parts[0]
      }
      self._log.histograms(step, histograms)
    is_last = step + 1 == self.total_steps
    if weights is None or not (is_due or is_last):
      return
    rollout = samples.rollout
    ids, mask, weights = processes.gather(
      (rollout.response_ids, rollout.response_mask, weights)
    )
    facts = zip(samples.scores.tolist(), samples.parts, strict=True)
    self.page(
      f"{self._about}: a rollout after {step} steps",
      lambda limit: token_pages.from_arrays(
        samples.tokenizer,
        samples.prompts,
        ids,
        mask,
        weights,
        facts=[{"reward": reward} | part for reward, part in facts],
        limit=limit,
      ),
      value_name=name,
      num_in_all=num_in_all or len(samples.texts),
    )

  def page(
    self,
    title: str,
    samples: Callable[[int], Sequence[token_pages.Sample]],
    **options: Any,
  ) -> None:
    """Writes `tokens.html`, unless --num_page_samples is 0.

    Args:
      title: of the page.
      samples: makes at most so many of them; called in the first process.
      **options: of `token_pages.write`.
    """
    limit = self._values.num_page_samples
    if limit and processes.is_first():
      path = os.path.join(self.workdir, "tokens.html")
      try:
        token_pages.write(path, title, samples(limit), limit=limit, **options)
      except OSError as error:  # A page is not worth a run.
        if not self._lacks_page:
          self.note(f"The page could not be written: {error}")
        self._lacks_page = True

  def summarise(
    self, names: Sequence[str] = (), *, prefix: str = "eval/", title: str = ""
  ) -> None:
    """Writes and prints the metrics before and after, and where the best is.

    Args:
      names: of metrics.
      prefix: all metrics that begin with it are shown, too.
      title: of the table; by default the workdir's name.
    """
    self._wait()
    if not processes.is_first():
      return
    rows = logs.read_rows(self.workdir)
    by_step = {row["step"]: row for row in rows}
    known = dict.fromkeys(name for row in rows for name in row)
    shown = [*names, *(x for x in known if x.startswith(prefix))]
    has_start = self._log.is_complete or 0 in by_step
    best = by_step.get(self._best and self._best.kept, {})
    table = {}
    for name in dict.fromkeys(shown):
      values = [row[name] for row in rows if name in row]
      if not values:
        continue
      table[name] = {"before": values[0]} if has_start else {}
      table[name]["after"] = values[-1]
      if name in best:
        table[name]["best"] = best[name]
    if not has_start:
      self.note("Rows of the first steps are missing: none is the one before.")
    self._log.summary(table, title=self._with_best(title or self.workdir))

  def finish(
    self, values: Mapping[str, Any], title: str = "Summary", **options: Any
  ) -> None:
    """Writes and prints a summary of the script's own; see `logs.Logs`."""
    self._wait()
    self._log.summary(values, title=self._with_best(title), **options)
    if not options and processes.is_first():  # What it was made of is done.
      scores = pathlib.Path(self.workdir, rows_lib.SCORES)
      for path in (scores, scores.with_suffix(".json")):
        path.unlink(missing_ok=True)

  def _with_best(self, title):
    return self._best.titled(title, self.total_steps) if self._best else title

  @property
  def _all_checkpoints(self):
    """Those of the state, and of the best."""
    own = self._checkpoints, self._best and self._best.checkpoints
    return [checkpoints for checkpoints in own if checkpoints is not None]

  def _wait(self):
    """Waits for what is being saved: where a summary is, everything is."""
    for checkpoints in self._all_checkpoints:
      checkpoints.wait()

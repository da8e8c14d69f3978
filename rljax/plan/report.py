"""Says what a plan means for a machine: memory, time, and what bounds it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rljax.plan import flops as flops_lib
from rljax.plan import hlo, targets

_PARTS = ("argument", "temporary", "output", "alias", "code")


@dataclasses.dataclass
class ProgramRow:
  """What one program takes; numbers are of one device unless they say more.

  Attributes:
    name: of the program.
    seconds: that it took to compile, at all depths together.
    memory: part -> bytes.
    beside: bytes that lie beside it.
    peak: bytes while it runs.
    flops: of the products outside the loop over tokens, of all devices.
    token_flops: of those in it, all rounds, of all devices.
    traffic: bytes of main memory outside the loop over tokens.
    token_traffic: of that loop, all rounds.
    sent: bytes over the links outside the loop over tokens.
    token_sent: of that loop, all rounds.
    rounds: of that loop at most.
    collectives: "kind at depth n" -> [number, bytes].
    traffic_by: what it is made of.
    calls: how often an ordinary step calls it.
    error: why it does not fit, if the compiler says so.
    warnings: sentences.
  """

  name: str
  seconds: float
  memory: dict[str, float]
  beside: float
  peak: float
  flops: float
  token_flops: float
  traffic: float
  token_traffic: float
  sent: float
  token_sent: float
  rounds: int
  collectives: dict[str, list[float]]
  traffic_by: dict[str, float]
  calls: int
  error: str
  warnings: list[str]


@dataclasses.dataclass
class Details:
  """What `inspect` finds in one program."""

  module: hlo.Module | None
  products: flops_lib.Products
  has_narrow: bool


def rows(programs: Sequence[Any], step: int) -> list[ProgramRow]:
  """Describes the programs of a plan.

  Args:
    programs: of a `planning.Plan`, with `Details`.
    step: an ordinary one, whose calls count.
  """
  return [_row(program, step) for program in programs]


def _row(program, step):
  module, counted = program.details.module, program.details.products
  empty = hlo.Module(hlo.Part(), hlo.Part(), 0, {}, [])
  module = module or empty
  collectives = {}
  for part in (module.outside, module.tokens):
    for (kind, depth), (number, size) in sorted(part.collectives.items()):
      name = f"{kind} at depth {depth}"
      found = collectives.setdefault(name, [0.0, 0.0])
      found[0] += number
      found[1] += size
  warnings = list(module.warnings)
  share = counted.wide / max(counted.total, 1.0)
  if program.details.has_narrow and counted.wide:
    warnings.insert(
      0,
      f"{share:.1%} of the operations are products with float32 beside "
      f"bfloat16, the largest {counted.widest}",
    )
  return ProgramRow(
    name=program.name,
    seconds=program.seconds,
    memory=dict(program.memory),
    beside=program.beside,
    peak=program.peak,
    flops=counted.outside,
    token_flops=counted.tokens,
    traffic=module.outside.traffic,
    token_traffic=module.tokens.traffic,
    sent=module.outside.link_bytes,
    token_sent=module.tokens.link_bytes,
    rounds=max(module.rounds, counted.rounds),
    collectives=collectives,
    traffic_by=module.traffic_by,
    calls=program.calls.get(step, 0),
    error=" ".join(program.error.split())[:300],
    warnings=warnings,
  )


def extrapolate(
  shallow: ProgramRow, deep: ProgramRow, depths: tuple[int, int], depth: int
) -> ProgramRow:
  """Draws a line through a program at two depths, to a third.

  Args:
    shallow: the program with fewer layers.
    deep: the same with more.
    depths: layers of the two.
    depth: layers that the numbers are wanted of.
  """
  share = (depth - depths[0]) / (depths[1] - depths[0])
  line = lambda a, b: max(0.0, a + share * (b - a))

  def both(a, b):
    if isinstance(a, dict):
      return {k: both(a.get(k, 0), b.get(k, 0)) for k in {**a, **b}}
    if isinstance(a, list) or isinstance(b, list):
      a, b = a or [0.0, 0.0], b or [0.0, 0.0]
      return [line(x, y) for x, y in zip(a, b, strict=True)]
    return line(a, b)

  names = ("name", "rounds", "calls", "error", "warnings")
  fixed = {name: getattr(deep, name) for name in names}
  fixed["error"] = shallow.error or deep.error
  fixed["seconds"] = shallow.seconds + deep.seconds
  return ProgramRow(
    **fixed,
    **{
      field.name: both(getattr(shallow, field.name), getattr(deep, field.name))
      for field in dataclasses.fields(ProgramRow)
      if field.name not in fixed
    },
  )


@dataclasses.dataclass(frozen=True)
class Times:
  """Least seconds by what bounds them; see `least`."""

  products: float
  memory: float
  links: float

  @property
  def seconds(self) -> float:
    """The least time: all three at once."""
    return max(self.products, self.memory, self.links)

  @property
  def bound(self) -> str:
    """What takes the longest."""
    return max(("products", "memory", "links"), key=lambda x: getattr(self, x))


def least(
  target: targets.Target, flops: float, traffic: float, sent: float
) -> Times:
  """Returns the times that a device cannot beat.

  Args:
    target: the machine, of a known speed.
    flops: of all devices, which share them evenly.
    traffic: bytes of one device's memory.
    sent: bytes over one device's links.
  """
  chip = target.chip
  return Times(
    flops / target.num_devices / chip.flops,
    traffic / chip.bandwidth,
    sent / chip.links,
  )


@dataclasses.dataclass
class Summary:
  """A machine's verdict.

  Attributes:
    fits: whether every program fits into its memory.
    peak: bytes on a device, at most.
    program: that takes them.
    room: bytes that programs may take; 0: not known.
    decode_step: least time of one token of all rows, or None.
    update: least time of the program with the most operations, or None.
    step: least seconds of an ordinary step, or None.
    flops: operations of an ordinary step, of all devices.
    tokens: response tokens of an ordinary step at most.
    mfu: share of the machine's operations that a step at its least time uses.
  """

  fits: bool
  peak: float
  program: str
  room: float
  decode_step: Times | None = None
  update: Times | None = None
  step: float | None = None
  flops: float = 0.0
  tokens: int = 0
  mfu: float | None = None


def summarise(
  target: targets.Target, found: Sequence[ProgramRow], tokens: int
) -> Summary:
  """Sums up the programs of a script on a machine.

  Args:
    target: the machine.
    found: its programs.
    tokens: response tokens of an ordinary step at most.
  """
  if not found:
    raise ValueError("The script compiled nothing; there is nothing to plan.")
  chip = target.chip
  room = chip.memory * chip.usable
  worst = max(found, key=lambda row: row.peak)
  fits = not any(row.error for row in found) and (
    not room or worst.peak <= room
  )
  called = [row for row in found if row.calls]
  if not any(row.rounds for row in called):
    tokens = 0  # A step samples nothing.
  summary = Summary(fits, worst.peak, worst.name, room, tokens=tokens)
  summary.flops = sum(r.calls * (r.flops + r.token_flops) for r in called)
  if not chip.flops:
    return summary
  times = [
    (
      row,
      least(target, row.flops, row.traffic, row.sent),
      least(target, row.token_flops, row.token_traffic, row.token_sent),
    )
    for row in found
  ]
  for row, _, inner in times:
    if row.rounds and row.calls and summary.decode_step is None:
      n = row.rounds
      summary.decode_step = Times(
        inner.products / n, inner.memory / n, inner.links / n
      )
  whole = [x for x in times if x[0].calls]
  if whole:
    summary.step = sum(r.calls * (a.seconds + b.seconds) for r, a, b in whole)
    summary.update = max(
      (a for r, a, _ in whole if not r.rounds),
      key=lambda a: a.products,
      default=None,
    )
    peak = summary.step * target.num_devices * chip.flops
    summary.mfu = summary.flops / peak if peak else None
  return summary


def text(
  target: targets.Target, found: Sequence[ProgramRow], summary: Summary
) -> str:
  """Writes a plan as text, program by program."""
  lines = [f"{target.name}: {target.num_devices} devices ({target.kind})"]
  if summary.room:
    lines[0] += f", {_size(summary.room)} each for programs"
  for row in found:
    lines += ["", f"{row.name}: compiled in {row.seconds:.1f} s"]
    if row.error:
      lines.append(f"  DOES NOT FIT: {row.error}")
    else:
      parts = [f"{part} {_size(row.memory[part])}" for part in _PARTS]
      lines.append("  memory: " + ", ".join(parts).replace("alias", "donated"))
      lines.append(
        f"  beside it {_size(row.beside)}, so {_size(row.peak)} in all"
      )
    lines.append(
      f"  products {row.flops + row.token_flops:.3g} operations on all devices"
      f", memory traffic {_size(row.traffic + row.token_traffic)}"
    )
    by = sorted(row.traffic_by.items(), key=lambda x: -x[1])
    lines.append("    " + ", ".join(f"{n} {_size(b)}" for n, b in by if b))
    for name, (number, size) in row.collectives.items():
      lines.append(f"  {name}: {number:,.0f} times, {_size(size)} in all")
    if row.rounds:
      lines.append(f"  loop over tokens: {row.rounds} rounds at most")
    lines += [f"  WARNING: {warning}." for warning in row.warnings]
  lines += ["", *_verdict(target, summary)]
  return "\n".join(lines)


def _verdict(target, summary):
  lines = []
  of = f" of {_size(summary.room)}" if summary.room else ""
  word = "fits" if summary.fits else "DOES NOT FIT"
  lines.append(
    f"{word}: {_size(summary.peak)}{of} on a device, in {summary.program}"
  )
  if not target.chip.flops:
    lines.append("No peak of this machine is known: no times.")
    return lines
  for name, times in (
    ("decode step", summary.decode_step),
    ("update program", summary.update),
  ):
    if times is not None:
      lines.append(
        f"{name}, at least: {_time(times.seconds)}, bound by {times.bound} "
        f"(products {_time(times.products)}, memory {_time(times.memory)}, "
        f"links {_time(times.links)})"
      )
  if summary.step:
    line = f"whole step, at least: {_time(summary.step)}"
    if summary.tokens:
      line += f", {summary.tokens / summary.step:,.0f} response tokens a second"
    lines.append(line + f", MFU {summary.mfu:.1%} at most")
  return lines


def _size(size: float) -> str:
  for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
    if size >= unit:
      return f"{size / unit:,.2f} {name}"
  return f"{size:,.0f} B"


def _time(seconds: float) -> str:
  for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
    if seconds >= unit:
      return f"{seconds / unit:.3g} {name}"
  return f"{seconds * 1e9:.3g} ns"

"""Reads compiled programs: collectives, memory traffic and what looks wrong.

The text of a compiled module says which instructions a device runs, in which
loops. A loop counts by the number of its rounds, which the compiler knows of
scans; another one, as that of the sampler, which may end early, has as many
rounds as the largest constant that its condition compares with.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SIZES = {
  **{"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2},
  **{"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8},
  **{"f8e4m3fn": 1, "f8e5m2": 1, "s4": 1, "u4": 1},
}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
COLLECTIVES = (
  *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
  *("collective-permute", "ragged-all-to-all"),
)
# What moves no data of its own.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
  *("call", "conditional", "after-all", "partition-id", "replica-id", "iota"),
  *("opt-barrier", "optimization-barrier", "domain", "async-done"),
  *("async-update", "copy-done", "all-gather-done", "all-reduce-done"),
  *("collective-permute-done", "reshape"),
}
# Made of the elements of their operands, one by one, where they are asked for.
_ELEMENTWISE = {
  *("bitcast", "reshape", "convert", "broadcast", "pad", "select", "compare"),
  *("add", "subtract", "multiply", "divide", "maximum", "minimum", "negate"),
  *("exponential", "log", "tanh", "abs", "and", "or", "not", "is-finite"),
}
_KEEPS = ("bitcast", "reshape", "copy", "convert", "transpose", "copy-done")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: of the value.
    opcode: what is done.
    arrays: `(dtype, shape, layout)` of the value, several for a tuple.
    operands: names of values.
    attributes: the rest of the line.
    is_root: whether the computation returns it.
  """

  name: str
  opcode: str
  arrays: tuple[tuple[str, tuple[int, ...], str], ...]
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @property
  def bytes(self) -> int:
    """Bytes of the value in the device's main memory."""
    return sum(map(_bytes, self.arrays))

  def called(self, attribute: str) -> str | None:
    """Returns the name of a computation that the line calls."""
    match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
    return match and match[1]


@dataclasses.dataclass
class Part:
  """What a device does in one part of a program, all rounds together.

  Attributes:
    traffic: bytes read and written in main memory.
    collectives: `(kind, depth of loops)` -> `[number, bytes]`.
    link_bytes: bytes that a device sends, by the usual ring algorithms.
  """

  traffic: float = 0.0
  collectives: dict[tuple[str, int], list[float]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(lambda: [0.0, 0.0])
  )
  link_bytes: float = 0.0


@dataclasses.dataclass
class Module:
  """What a compiled module does on each device.

  Attributes:
    outside: all but the loops over tokens.
    tokens: the loops over tokens, all rounds, if there are any.
    rounds: of those at most, together; 0 where there is none.
    traffic_by: opcode -> bytes, of all parts.
    warnings: sentences about what costs more than it should.
  """

  outside: Part
  tokens: Part
  rounds: int
  traffic_by: dict[str, float]
  warnings: list[str]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Parses a module.

  Args:
    text: from `as_text` of a compiled program.

  Returns:
    Name of a computation -> its instructions, and the name of the first one.
  """
  computations, entry, lines = {}, "", None
  for line in text.splitlines():
    if lines is None:
      if head := _HEAD.match(line):
        lines = computations.setdefault(head[2], [])
        entry = head[2] if head[1] else entry
    elif line.startswith("}") and not line.startswith("}}"):
      lines = None  # "}}" ends an attribute that goes over several lines.
    elif match := _LINE.match(line):
      lines.append(_instruction(line, match))
  return computations, entry


def measure(
  text: str,
  *,
  token_loops: Sequence[int] = (),
  shapes: Sequence[tuple[int, ...]] = (),
  vocab_size: int = 0,
  rows: int = 0,
) -> Module:
  """Measures what a compiled module does.

  Args:
    text: from `as_text` of a compiled program.
    token_loops: rounds at most of the loops over tokens, by which they are
      known.
    shapes: of a device's parts of the parameters.
    vocab_size: V of the policy; 0: logits are not looked at.
    rows: that a device should compute logits of in the loop over tokens; 0:
      not looked at.
  """
  computations, entry = parse(text)
  walk = _Walk(computations, token_loops, set(shapes), vocab_size, rows)
  if entry:
    walk.visit(entry, 1.0, 0, None, frozenset())
  return walk.module()


class _Walk:
  """Follows the calls of a module, and adds up what its parts do."""

  def __init__(self, computations, token_loops, shapes, vocab_size, rows):
    self._computations, self._token_loops = computations, token_loops
    self._shapes, self._vocab_size, self._rows = shapes, vocab_size, rows
    self._outside, self._tokens, self._rounds = Part(), Part(), 0
    self._traffic = collections.defaultdict(float)
    self._found = collections.defaultdict(float)  # Kind of warning -> bytes.
    self._squares = set()
    self._tables = {}

  def visit(self, name, times, depth, rounds, fixed) -> None:
    """Adds a computation.

    Args:
      name: of it.
      times: how often it runs.
      depth: of loops around it.
      rounds: of the loop over tokens around it, or None.
      fixed: names of values in it that a loop around it does not change.
    """
    table = self._table(name)
    part = self._outside if rounds is None else self._tokens
    for line in self._computations[name]:
      if line.opcode == "while":
        self._loop(line, times, depth, rounds)
        continue
      for target in self._calls(line):
        self.visit(target, times, depth, rounds, frozenset())
      self._collective(line, table, times, depth, rounds, fixed, part)
      if line.opcode in _FREE or line.opcode.endswith("-done"):
        continue
      moved = self._moved(line, table)
      part.traffic += times * moved
      self._traffic[_kind(line)] += times * moved
      self._warn(line, table, times, depth, rounds, fixed)

  def module(self) -> Module:
    """Returns what was added up."""
    size = lambda kind: f"{self._found[kind] / 1e6:,.0f} MB"
    texts = {
      "gather": "parameters are gathered in the loop over tokens, {}",
      "convert": "parameters are converted inside a loop, {} read",
      "square": "arrays as large as all pairs of positions lie in memory, {}",
      "logits": "logits of more rows or tokens than its share on a device, {}",
      "copy": "copies of 1 MB and more inside of loops, {}",
    }
    return Module(
      outside=self._outside,
      tokens=self._tokens,
      rounds=self._rounds,
      traffic_by=dict(self._traffic),
      warnings=[
        text.format(size(kind))
        for kind, text in texts.items()
        if self._found[kind]
      ],
    )

  def _table(self, name) -> Mapping[str, Instruction]:
    if name not in self._tables:
      lines = self._computations[name]
      self._tables[name] = {line.name: line for line in lines}
    return self._tables[name]

  def _calls(self, line) -> Iterator[str]:
    if line.opcode in ("call", "async-start"):
      target = line.called("to_apply") or line.called("calls")
      if target in self._computations:
        yield target
    elif line.opcode == "conditional":
      names = _NAME.findall(line.attributes)
      yield from (name for name in names if name in self._computations)

  def _loop(self, line, times, depth, rounds):
    body, condition = line.called("body"), line.called("condition")
    known = _TRIPS.search(line.attributes)
    trips = int(known[1]) if known else self._largest_constant(condition)
    is_over_tokens = trips in self._token_loops and not known
    if is_over_tokens and rounds is None:
      rounds = trips
      self._rounds += trips
    self.visit(body, times * trips, depth + 1, rounds, self._fixed(body))

  def _largest_constant(self, name) -> int:
    """Returns the largest integer in a condition and what it calls, or 1."""
    largest, waiting = 1, [name]
    while waiting:
      for line in self._computations.get(waiting.pop(), ()):
        if line.opcode == "constant" and line.arrays[0][0] in ("s32", "s64"):
          value = re.match(r"\((-?\d+)\)", line.attributes)
          largest = max(largest, int(value[1]) if value else 1)
        for attribute in ("calls", "to_apply"):
          if target := line.called(attribute):
            waiting.append(target)
    return largest

  def _fixed(self, name) -> frozenset[str]:
    """Returns values of a loop's body that no round changes."""
    lines = self._computations[name]
    elements = {}
    for line in lines:
      index = re.search(r"\bindex=(\d+)", line.attributes)
      if line.opcode == "get-tuple-element" and index:
        elements[line.name] = int(index[1])
    root = next(line for line in lines if line.is_root)
    fixed = {
      operand
      for place, operand in enumerate(root.operands)
      if elements.get(operand) == place
    }
    places = {elements[name] for name in fixed}
    return frozenset(n for n, place in elements.items() if place in places)

  def _source(self, name, table):
    """Follows a value through what keeps its content."""
    while name in table:
      line = table[name]
      is_kept = line.opcode in _KEEPS or (
        line.opcode == "fusion" and len(line.operands) == 1
      )
      if not is_kept or not line.operands:
        break
      name = line.operands[0]
    return name

  def _collective(self, line, table, times, depth, rounds, fixed, part):
    target = line.called("calls") if line.opcode == "fusion" else None
    for inner in self._computations.get(target, ()):
      # A TPU sums and keeps a part of it in one fusion.
      self._add_collective(
        inner, times, depth, part, kept=sum(_sizes(line.arrays))
      )
    self._add_collective(line, times, depth, part)
    is_gather = line.opcode.removesuffix("-start") == "all-gather"
    if rounds is not None and is_gather:
      sources = {self._source(name, table) for name in line.operands}
      if sources & fixed:
        self._found["gather"] += times * sum(_sizes(_results(line)))

  def _add_collective(self, line, times, depth, part, kept=None):
    opcode = line.opcode.removesuffix("-start")
    if opcode not in COLLECTIVES:
      return
    size = sum(_sizes(_results(line)))
    devices = _group_size(line.attributes)
    if opcode == "reduce-scatter":
      size *= devices  # What goes in, as for the others.
    elif opcode == "all-reduce" and kept and kept * devices <= size:
      opcode = "reduce-scatter"
    found = part.collectives[opcode, depth]
    found[0] += times
    found[1] += times * size
    sent = size * (1 - 1 / devices) if opcode != "collective-permute" else size
    part.link_bytes += times * sent * (2 if opcode == "all-reduce" else 1)

  def _moved(self, line, table) -> float:
    """Returns bytes that an instruction reads and writes."""
    if line.opcode in ("dynamic-slice", "gather", "slice"):
      return 2 * line.bytes
    if line.opcode in ("dynamic-update-slice", "scatter"):
      update = table.get(line.operands[-1 if line.opcode == "scatter" else 1])
      return 2 * (update.bytes if update else 0)
    reads = [table[x].bytes if x in table else 0 for x in line.operands]
    written = line.bytes
    target = line.called("calls") if line.opcode == "fusion" else None
    if target in self._computations:
      reads, written = self._fusion(target, reads, written)
    return sum(reads) + written

  def _fusion(self, target, reads, written):
    """Corrects for parts of arrays that a fusion reads or writes."""
    lines, inner = self._computations[target], self._table(target)
    users = collections.defaultdict(list)
    for x in lines:
      for operand in x.operands:
        users[operand].append(x)
    reads = list(reads)
    for x in lines:
      if x.opcode != "parameter":
        continue
      number = int(re.match(r"\((\d+)\)", x.attributes)[1])
      used = _through(x.name, users)
      if number >= len(reads) or not used:
        continue
      ends = _through(x.name, users, _ELEMENTWISE)
      if all(u.opcode in ("dynamic-slice", "slice", "gather") for u in ends):
        reads[number] = min(reads[number], sum(u.bytes for u in ends))
      elif all(
        u.opcode == "dynamic-update-slice"
        and self._source(u.operands[0], inner) == x.name
        for u in used
      ):
        reads[number] = 0  # Written to in place.
    updates = [x for x in lines if x.opcode == "dynamic-update-slice"]
    for x in updates:
      update = inner.get(x.operands[1])
      if update is not None:
        written -= max(0, min(written, x.bytes) - update.bytes)
    return reads, written

  def _warn(self, line, table, times, depth, rounds, fixed):
    if depth:
      for name in line.operands:
        is_converted = line.opcode in ("convert", "fusion", "custom-call")
        if not (is_converted and self._source(name, table) in fixed):
          continue
        source = table.get(self._source(name, table))
        if source is None or source.bytes < 2**16:
          continue
        if source.arrays[0][0] == "f32" and self._narrows(line, name):
          self._found["convert"] += times * source.bytes
      if line.opcode in ("copy", "transpose") and line.bytes >= 2**20:
        self._found["copy"] += times * 2 * line.bytes
    for dtype, shape, layout in line.arrays:
      if _bytes((dtype, shape, layout)) >= 2**24 and _is_square(shape):
        self._found["square"] += times * _bytes((dtype, shape, layout))
    if rounds is not None and self._vocab_size and self._rows:
      self._check_logits(line, times)

  def _narrows(self, line, operand) -> bool:
    """Whether an instruction converts an operand to a narrower type."""
    narrow = ("bf16", "f16")
    if line.opcode == "convert":
      return line.arrays[0][0] in narrow
    target = line.called("calls")
    if target not in self._computations:
      return False
    number = line.operands.index(operand)
    inner = self._computations[target]
    parameters = {
      x.name
      for x in inner
      if x.opcode == "parameter" and x.attributes.startswith(f"({number})")
    }
    return any(
      x.opcode == "convert"
      and x.arrays[0][0] in narrow
      and self._source(x.operands[0], self._table(target)) in parameters
      for x in inner
    )

  def _check_logits(self, line, times):
    """Logits are at most [rows, a device's share of the vocabulary]."""
    if "dot_general" in line.attributes:
      return  # Where the width is split, sums of all rows are in part anywhere.
    for dtype, shape, layout in line.arrays:
      if dtype != "f32" or len(shape) < 2 or shape in self._shapes:
        continue
      is_wide = shape[-1] % self._vocab_size == 0
      if is_wide and math.prod(shape) > self._vocab_size * self._rows:
        self._found["logits"] += times * _bytes((dtype, shape, layout))


def _instruction(line, match):
  rest = line[match.end() :]
  end = _closing(rest) if rest.startswith("(") else rest.index(" ")
  arrays = tuple(
    (kind, tuple(int(n) for n in dims.split(",") if n), layout)
    for kind, dims, layout in _ARRAY.findall(rest[:end])
  )
  rest = rest[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest) - 1
  inner, attributes = rest[: end - 1], rest[end:]
  operands = tuple(_NAME.findall(inner))
  if opcode in ("parameter", "constant"):
    operands, attributes = (), f"({inner}){attributes}"
  return Instruction(
    match[2], opcode.strip(), arrays, operands, attributes, bool(match[1])
  )


def _closing(text: str) -> int:
  """Returns the place behind the parenthesis that closes the first one."""
  depth = 0
  for match in re.finditer(r"[()]", text):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.end()
  return len(text)


def _bytes(array, any_memory=False) -> int:
  dtype, shape, layout = array
  # S(1) is memory on the chip, which a compiler fills ahead of its use.
  if not any_memory and re.search(r"S\([1-9]", layout):
    return 0
  return math.prod(shape) * _SIZES.get(dtype, 0)


def _sizes(arrays) -> list[int]:
  """Returns the bytes of arrays, in whatever memory they lie."""
  return [_bytes(x, any_memory=True) for x in arrays]


def _results(line) -> Sequence[Any]:
  """Returns the arrays that a collective makes."""
  if not line.opcode.endswith("-start"):
    return line.arrays
  # What goes in stands first, but for sums, whose parts have its shapes.
  number = len(line.operands)
  is_both = len(line.arrays) >= 2 * number and line.opcode != "all-reduce-start"
  return line.arrays[number : 2 * number] if is_both else line.arrays


def _group_size(attributes: str) -> int:
  """Returns how many devices take part in a collective."""
  if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
    return int(match[2])
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return match[1].count(",") + 1
  if match := re.search(
    r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes
  ):
    sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", match[1]))
    axes = re.findall(r"'([\w.]+)'", match[2])
    return math.prod(int(sizes[axis]) for axis in axes)
  return 2


def _kind(line) -> str:
  """What an instruction is called in the table of traffic."""
  if line.opcode == "fusion" and "dot" in line.attributes.split("metadata")[-1]:
    return "products"
  if line.opcode in ("dot", "convolution", "custom-call"):
    return "products"
  if line.opcode in COLLECTIVES or line.opcode.endswith("-start"):
    is_linked = line.opcode.removesuffix("-start") in COLLECTIVES
    return "collectives" if is_linked else "prefetches"
  return "copies" if line.opcode in ("copy", "transpose") else "the rest"


def _is_square(shape) -> bool:
  return len(shape) >= 3 and shape[-1] == shape[-2] and shape[-1] >= 128


def _through(
  name, users, opcodes=("bitcast", "reshape", "convert")
) -> list[Instruction]:
  """Returns what uses a value, behind instructions of some kinds, once each."""
  found, waiting = {}, [name]
  seen = set(waiting)
  while waiting:
    for user in users[waiting.pop()]:
      if user.opcode not in opcodes or user.is_root:
        found[user.name] = user
      elif user.name not in seen:
        seen.add(user.name)
        waiting.append(user.name)
  return list(found.values())

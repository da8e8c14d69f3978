"""Holds the package to the table of which module may import which."""

import ast
import graphlib
import pathlib
import subprocess
import sys

from absl.testing import absltest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Room -> the rooms that its files may import. A room may import itself.
MAY_IMPORT = {
  "storage": [],
  "ops": [],
  "distributed": ["storage"],
  "losses": ["ops"],
  "text": ["storage"],
  "tasks": ["text", "storage"],
  "models": ["storage", "distributed"],  # A plan has no weights to load.
  "generation": ["ops", "models", "text", "distributed"],
  "scoring": [
    *("tasks", "models", "generation", "text", "distributed", "ops"),
    "storage",
  ],
  "rlmec": ["text", "generation", "scoring", "distributed", "storage", "ops"],
  "evaluation": ["ops", "text", "generation", "distributed", "storage"],
  "training": [
    *("storage", "distributed", "generation", "models", "evaluation", "ops"),
  ],
}
MAY_IMPORT["cli"] = list(MAY_IMPORT)
# It runs scripts, which import the rest.
MAY_IMPORT["plan"] = ["distributed", "cli"]
# Commands: python -m rljax.export and the like.
MAY_IMPORT["doctor"] = ["distributed"]
MAY_IMPORT["export"] = ["models", "storage"]
MAY_IMPORT["compare"] = ["evaluation", "text", "training", "storage"]
NO_JAX = ["text", "tasks"]
ARRAYS_ONLY = ["ops", "losses"]


def _modules():
  """Dotted name below rljax -> source path; the packages' own files too."""
  package = ROOT / "rljax"
  for path in sorted(package.rglob("*.py")):
    parts = list(path.relative_to(package).with_suffix("").parts)
    if parts[-1] == "__init__":
      parts.pop()
    yield ".".join(parts), path


def _imports(path):
  """Absolute dotted names that a file imports, anywhere in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} has a relative import"
      for alias in node.names:
        yield f"{node.module}.{alias.name}"


def _own(path):
  """Names below rljax that a file imports: "ops.masking"."""
  for name in _imports(path):
    if name == "rljax" or name.startswith("rljax."):
      yield name.removeprefix("rljax").removeprefix(".")


class ImportsTest(absltest.TestCase):
  def test_package_keeps_to_the_table(self):
    for module, path in _modules():
      room = module.split(".")[0]
      if not room:  # The package itself re-exports nothing.
        self.assertEqual(list(_own(path)), [], path)
        continue
      self.assertIn(room, MAY_IMPORT, f"{path} is in no room of MAY_IMPORT")
      for name in _own(path):
        target = name.split(".")[0]
        self.assertIn(
          target,
          [room, *MAY_IMPORT[room]],
          f"{path}: {room} may not import rljax.{name}",
        )

  def test_rooms_and_files_form_no_circle(self):
    files = {module: set() for module, _ in _modules()}
    for module, path in _modules():
      for name in _own(path):
        while name and name not in files:
          name = name.rpartition(".")[0]
        if name != module:
          files[module].add(name)
    rooms = {}
    for module, targets in files.items():
      room = module.split(".")[0]
      rooms.setdefault(room, set()).update(
        {target.split(".")[0] for target in targets} - {room}
      )
    for graph in (files, rooms):
      try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
      except graphlib.CycleError as error:
        self.fail(f"modules import each other: {' -> '.join(error.args[1])}")

  def test_rooms_re_export_nothing(self):
    for module, path in _modules():
      if path.name == "__init__.py" and module in MAY_IMPORT:
        used = ["text.keywords", "tasks.own", "storage.calls"]
        allowed = used if module == "tasks" else []
        own = set(_own(path))
        if module == "cli":  # Scripts write cli.define_run, whatever its file.
          own = {name for name in own if not name.startswith("cli.")}
        self.assertLessEqual(own, set(allowed), path)

  def test_text_side_has_no_jax(self):
    for module, path in _modules():
      if module.split(".")[0] in NO_JAX:
        for name in _imports(path):
          self.assertNotIn(name.split(".")[0], ("jax", "flax", "chex"), path)

  def test_array_functions_need_jax_and_chex_alone(self):
    for module, path in _modules():
      if module.split(".")[0] in ARRAYS_ONLY:
        roots = {name.split(".")[0] for name in _imports(path)}
        outside = roots - set(sys.stdlib_module_names)
        self.assertLessEqual(outside, {"jax", "chex", "numpy", "rljax"}, path)

  def test_nothing_imports_nnx_or_torch(self):
    folders = [ROOT / "rljax", ROOT / "experiments"]
    for folder in folders:
      for path in sorted(folder.rglob("*.py")):
        for name in _imports(path):
          self.assertFalse(name.startswith("flax.nnx"), path)
          self.assertNotIn(name.split(".")[0], ("torch", "qwix", "clu"), path)

  def test_experiments_do_not_import_each_other(self):
    for path in sorted((ROOT / "experiments").rglob("*.py")):
      for name in _imports(path):
        self.assertNotEqual(name.split(".")[0], "experiments", path)

  def test_scripts_import_light(self):
    # --help must not pay for transformers, orbax, matplotlib or tensorflow.
    heavy = ["transformers", "orbax", "matplotlib", "tensorflow_datasets"]
    names = [
      f"rljax.{module}"
      for module, _ in _modules()
      if module and not module.startswith("tasks.games.play")
    ]
    program = (
      f"import importlib, sys\n[importlib.import_module(n) for n in {names}]\n"
      f"print([n for n in {heavy} if n in sys.modules])"
    )
    done = subprocess.run(
      [sys.executable, "-c", program],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
    self.assertEqual(done.stdout.strip(), "[]")


if __name__ == "__main__":
  absltest.main()

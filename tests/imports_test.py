"""Holds the package to the table of which module may import which."""

import ast
import fnmatch
import pathlib
import subprocess
import sys

from absl.testing import absltest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Module pattern -> patterns of the rljax modules that it may import.
MAY_IMPORT = {
  "masking": [],
  "log_probs": ["masking"],
  "advantages": ["masking", "log_probs"],
  "rewards": ["masking", "log_probs"],
  "reward_terms": ["rewards"],
  "sampling": ["masking", "log_probs"],
  "losses.*": ["masking", "log_probs"],
  # The one door to models reads the checkpoints that training wrote.
  "models.hf": ["models.*", "checkpoint"],
  "models.*": ["models.*"],
  # The sampler masks its logits with the trainer's own function.
  "generation": ["sampling", "log_probs"],
  "grammars": [],
  "processes": ["doctor"],
  "rollout": ["generation", "log_probs", "masking", "processes", "sampling"],
  "preflight": [
    "generation",
    "log_probs",
    "masking",
    "processes",
    "rollout",
    "sampling",
  ],
  "reward_model": [
    "checkpoint",
    "data",
    "meshes",
    "models.classifier",
    "models.hf",
  ],
  "responses": [
    "data",
    "generation",
    "meshes",
    "preflight",
    "processes",
    "rollout",
    "sampling",
    "scoring",
  ],
  "reference": [
    "checkpoint",
    "data",
    "log_probs",
    "logged",
    "meshes",
    "preflight",
    "processes",
    "rollout",
  ],
  "scoring": ["processes", "reward_model", "tasks"],
  "evaluation": ["generation", "rollout", "log_probs", "masking", "traces"],
  "data": ["data", "edits"],
  "edits": [],
  "rewriting": ["traces"],
  "gold_rewrites": ["edits", "rewriting", "traces"],
  "corrections": [
    "data",
    "processes",
    "responses",
    "rewriting",
    "sampling",
    "stages",
    "tasks",
    "traces",
  ],
  "supervision": ["data", "rewards"],
  "stages": [],
  "doctor": ["meshes", "processes"],
  "pages": [],
  "traces": [],
  "logged": ["data", "tasks"],
  "outcomes": ["data", "logged", "traces"],
  "tasks.*": ["data", "edits", "logged", "tasks.*", "traces", "workers"],
  "tasks": ["tasks.*"],
  "meshes": ["processes"],
  "checkpoint": [],
  "runs": ["checkpoint", "processes"],
  "logs": [],
  "report": [],
  "workers": [],
}
NO_JAX = [
  "data",
  "edits",
  "gold_rewrites",
  "logged",
  "outcomes",
  "pages",
  "rewriting",
  "stages",
  "tasks",
  "tasks.*",
  "traces",
  "workers",
]
ARRAYS_ONLY = [
  "masking",
  "log_probs",
  "advantages",
  "rewards",
  "sampling",
  "losses.*",
]


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


def _matches(name, patterns):
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class ImportsTest(absltest.TestCase):
  def test_package_keeps_to_the_table(self):
    for module, path in _modules():
      own = [name for name in _imports(path) if name.startswith("rljax")]
      if module == "" or module in ("losses", "models"):
        self.assertEqual(own, [], f"{path} re-exports")
        continue
      rules = [p for p in MAY_IMPORT if fnmatch.fnmatchcase(module, p)]
      self.assertNotEmpty(rules, f"{module} has no row in MAY_IMPORT")
      # `from rljax import masking` arrives here as rljax.masking.
      for name in own:
        target = name.removeprefix("rljax.")
        self.assertTrue(
          _matches(target, MAY_IMPORT[rules[0]]),
          f"rljax.{module} may not import {name}",
        )

  def test_text_side_has_no_jax(self):
    for module, path in _modules():
      if _matches(module, NO_JAX):
        for name in _imports(path):
          self.assertNotIn(name.split(".")[0], ("jax", "flax", "chex"), path)

  def test_array_functions_need_jax_and_chex_alone(self):
    for module, path in _modules():
      if _matches(module, ARRAYS_ONLY):
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
      if module and "." not in module
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

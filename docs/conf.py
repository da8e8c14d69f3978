"""Settings of the site: Markdown by MyST, the API from docstrings.

bash launch/docs.sh    # docs/_build/html/index.html
"""

import ast
import importlib.util
import pathlib
import re
import sys

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
sys.path[:0] = [str(ROOT), str(DOCS)]

import docstrings  # noqa: E402
from docutils import nodes  # noqa: E402

import rljax  # noqa: E402

project = "rljax"
author = "The rljax authors"
copyright = f"2026, {author}"
release = version = rljax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
root_doc = "index"

myst_heading_anchors = 3  # Links such as page.md#a-heading, as GitHub has them.
smartquotes = False  # "--flag" keeps its two dashes.
highlight_language = "text"

# Members are in the order of their source, and without a docstring not there.
autodoc_default_options = {
  "members": True,
  "member-order": "bysource",
  "special-members": "__call__",
}
autodoc_inherit_docstrings = False  # flax.linen's, on every `setup`.
# What a reader of the site need not have installed.
autodoc_mock_imports = [
  name
  for name in (
    *("gguf", "lark", "ludax", "math_verify", "reasoning_gym"),
    *("tensorflow_datasets", "vaderSentiment", "wandb"),
  )
  if importlib.util.find_spec(name) is None
]
add_module_names = False
python_maximum_signature_line_length = 72
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "rljax"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
  "home_page_in_toc": True,
  "navbar_persistent": [],  # The search is in the sidebar.
  "show_toc_level": 2,
  "use_download_button": False,
  # A page that is one wide table needs no table of contents beside it.
  "secondary_sidebar_items": {"**": ["page-toc"], "flags": []},
}

# The sidebar. It is added to the first page when that is read: in the file
# itself, whoever reads it in the repository would see it as code.
PAGES = {
  "Papers": ["ppo_programmed_rewards", "a_lol", "reasoning", "grpo", "rlmec"],
  "Guides": [
    *(
      "own_data",
      "forking",
      "tasks",
      "data",
      "models",
      "lora",
      "runs",
      "devices",
      "generated/launching",
      "speed",
    ),
  ],
  "Reference": [
    *("metrics", "flags", "generated/api/index", "generated/changelog"),
  ],
}

# Pages that other folders hold, by the name of their copy.
COPIES = {
  "launch/README.md": "launching.md",
  "CHANGELOG.md": "changelog.md",
}


def write_copies():
  """Copies the pages of other folders, so that links to them stay inside."""
  for source, name in COPIES.items():
    write(GENERATED / name, (ROOT / source).read_text())


def write_api():
  """Writes a page for every room of the package, and one for its rooms."""
  package = ROOT / "rljax"
  pages = {}
  for path in sorted(package.rglob("*.py")):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
      parts.pop()
    if len(parts) == 1:
      continue
    # A folder inside of a room has a page of its own.
    is_room = path.name == "__init__.py" or len(parts) == 2
    page = ".".join(parts if is_room else parts[:-1])
    pages.setdefault(page, []).append((".".join(parts), first_line(path)))
  lines = ["# API reference", "", "Made from the docstrings, room by room.", ""]
  lines += [f"- [`{page}`]({page}.md): {pages[page][0][1]}" for page in pages]
  lines += toctree(pages)
  write(GENERATED / "api" / "index.md", "\n".join(lines))
  for page, modules in pages.items():
    lines = [f"# {page}", "", *automodule(page)]
    for name, _ in modules[1:]:
      lines += [f"## {name}", "", *automodule(name)]
    write(GENERATED / "api" / f"{page}.md", "\n".join(lines))
  for path in (GENERATED / "api").glob("*.md"):
    if path.stem not in (*pages, "index"):  # Of a room that is gone.
      path.unlink()


def automodule(name):
  """Documents a module; a function of the room may have its name already."""
  parent, _, own = name.rpartition(".")
  path = ROOT / parent.replace(".", "/") / "__init__.py"
  functions = {
    node.name
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
  }
  options = ["   :no-index:"] if own in functions else []
  return ["```{eval-rst}", f".. automodule:: {name}", *options, "```", ""]


def toctree(pages, caption=""):
  options = [":hidden:"] + ([f":caption: {caption}"] if caption else [])
  return ["", "```{toctree}", *options, "", *pages, "```", ""]


def first_line(path):
  docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
  return docstring.partition("\n")[0]


def write(path, text):
  """Writes a page, unless it is there already: Sphinx then skips it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if not path.exists() or path.read_text() != text:
    path.write_text(text)


def complete(app, name, source):
  """Adds the sidebar, and lets links to other folders lead to their copies."""
  if name == root_doc:
    for caption, pages in PAGES.items():
      source[0] += "\n".join(toctree(pages, caption))
  depth = name.count("/")
  text = source[0]
  for page, copy in COPIES.items():
    target = f"{'../' * depth}generated/{copy}"
    text = text.replace(f"]({'../' * (depth + 1)}{page}", f"]({target}")
  up = "../" * depth
  # A room's source, where a page speaks of its reference.
  text = re.sub(
    r"\]\((?:\.\./)+(rljax/[\w/]+)/__init__\.py",
    lambda link: f"]({up}generated/api/{link[1].replace('/', '.')}.md",
    text,
  )
  # The README's part is played by the first page.
  source[0] = re.sub(r"\]\((\.\./)+README\.md", rf"]({up}index.md", text)


def convert(app, what, name, thing, options, lines):
  lines[:] = docstrings.to_rst(lines)


def as_written(app, what, name, thing, options, arguments, returned):
  module = sys.modules.get(getattr(thing, "__module__", None) or "")
  if not (module and module.__name__.startswith("rljax.")):
    return arguments, returned
  return docstrings.signature(name, module) or (arguments, returned)


def skip(app, what, name, thing, is_skipped, options):
  """Leaves out the fields of tuples, whose docstrings say nothing."""
  if "Alias for field number" in (getattr(thing, "__doc__", "") or ""):
    return True
  return None


def set_dashes(app, doctree):
  """Puts a dash between a parameter's name and text: " -- " looks like code."""
  for text in list(doctree.findall(nodes.Text)):
    if text == " -- ":
      text.parent.replace(text, nodes.Text(" – "))


def setup(app):
  app.connect("doctree-read", set_dashes)
  app.connect("source-read", complete)
  app.connect("autodoc-process-docstring", convert)
  app.connect("autodoc-process-signature", as_written)
  app.connect("autodoc-skip-member", skip)


write_copies()
write_api()

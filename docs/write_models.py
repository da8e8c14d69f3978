"""Writes the table of families in models.md: a mark is a test that reads one.

python docs/write_models.py    (tests/models/families_test.py compares it)
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"


def main() -> None:
  sys.path.insert(0, str(ROOT))
  from tests.models import families_test

  text = PAGE.read_text()
  start = text.index("| `model_type` |")
  end = text.index("\n\n", start)
  PAGE.write_text(text[:start] + families_test.table() + text[end:])


if __name__ == "__main__":
  main()

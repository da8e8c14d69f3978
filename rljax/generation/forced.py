"""Files of the tokens that a policy is to be sampled with."""

import os
from typing import Any

import numpy as np

from rljax.distributed import processes
from rljax.text import files

_FORCED = "forced.json"


def save(
  workdir: str | os.PathLike[str],
  forced: np.ndarray,
  forced_as: int | None = None,
) -> None:
  """Files which tokens a policy is to be sampled with.

  Of several processes, the first one does.

  Args:
    workdir: of the policy.
    forced: `[V + 1]` int, see `decode.sample`.
    forced_as: the token that stands for them in texts, or None.
  """
  if not processes.is_first():
    return
  after = {str(i): int(forced[i]) for i in np.flatnonzero(forced[:-1] >= 0)}
  files.write_jsonl(
    os.path.join(workdir, _FORCED),
    [
      {
        "vocab_size": len(forced) - 1,
        "first": int(forced[-1]),
        "after": after,
        "shown_as": forced_as,
      }
    ],
  )


def load(name: str | os.PathLike[str]) -> dict[str, Any]:
  """The tokens that a policy is to be sampled with, if there are any.

  Args:
    name: of the policy, in any form that a flag --policy takes.

  Returns:
    `forced` and `forced_as` for a `Responder`; nothing where there are none.
  """
  path = os.path.join(name, _FORCED)
  if not os.path.isfile(path):
    return {}
  (found,) = files.read_jsonl(path)
  forced = np.full(found["vocab_size"] + 1, -1, np.int32)
  forced[-1] = found["first"]
  for token, following in found["after"].items():
    forced[int(token)] = following
  return {"forced": forced, "forced_as": found["shown_as"]}

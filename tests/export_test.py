"""Sending an exported model to the hub, with a stand-in for its package."""

import contextlib
import io
import sys
import types
from unittest import mock

from absl.testing import absltest, parameterized

from rljax import export

NAME = "my-name/my-model"


class Refused(Exception):
  """As the hub's own errors are: with a response, if there was one."""

  def __init__(self, text, status=None):
    super().__init__(text)
    if status is not None:
      self.response = types.SimpleNamespace(status_code=status)


def _hub(error=None, token="hf_x"):
  """The package, and the list of calls of its HfApi."""
  calls = []

  class HfApi:
    def create_repo(self, *args, **options):
      calls.append(("create_repo", args, options))
      if error is not None:
        raise error

    def upload_folder(self, *args, **options):
      calls.append(("upload_folder", args, options))

  package = types.ModuleType("huggingface_hub")
  package.HfApi, package.get_token = HfApi, lambda: token
  return package, calls


def _main(*words, package):
  """Exit status, calls of `export`, and what was printed."""
  out, err = io.StringIO(), io.StringIO()
  with (
    mock.patch.dict(sys.modules, huggingface_hub=package),
    mock.patch.object(export, "export") as write,
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    status = export.main(["runs/x", "out", *words])
  return status, write.call_count, out.getvalue() + err.getvalue()


class PushTest(parameterized.TestCase):
  def test_calls(self):
    package, calls = _hub()
    status, num_written, said = _main(f"--push={NAME}", package=package)
    self.assertEqual((status, num_written), (0, 1), said)
    self.assertEqual(
      calls,
      [
        ("create_repo", (NAME,), {"private": True, "exist_ok": True}),
        ("upload_folder", (), {"repo_id": NAME, "folder_path": "out"}),
      ],
    )
    self.assertIn(f"Pushed to https://huggingface.co/{NAME}.", said)

  def test_the_package_takes_these_calls(self):
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with (
      mock.patch.object(api, "create_repo", autospec=True) as create,
      mock.patch.object(api, "upload_folder", autospec=True) as upload,
    ):
      export.push("out", NAME, api)
    create.assert_called_once()
    upload.assert_called_once()
    self.assertTrue(callable(huggingface_hub.get_token))

  def test_is_not_imported_unless_asked(self):
    status, num_written, said = _main(package=None)
    self.assertEqual((status, num_written), (0, 1), said)

  @parameterized.parameters(
    ("my-model", {}, r"--push=my-model must be organisation/name"),
    ("a/b/c", {}, r"--push=a/b/c must be organisation/name"),
    (NAME, {"token": None}, r"no token of the hub. Set HF_TOKEN .* my-name"),
  )
  def test_refused_before_anything_is_written(self, name, options, words):
    package, calls = _hub(**options)
    status, num_written, said = _main(f"--push={name}", package=package)
    self.assertEqual((status, num_written, calls), (1, 0, []))
    self.assertRegex(said, words)

  def test_without_the_package(self):
    status, num_written, said = _main(f"--push={NAME}", package=None)
    self.assertEqual((status, num_written), (1, 0))
    self.assertIn("pip install huggingface_hub", said)

  @parameterized.parameters(
    (Refused("403 Forbidden\nmore", 403), "may not write there.*403 Forbidden"),
    (Refused("", 500), "refuses with status 500 .*no reason given"),
    (ConnectionError("no route"), "cannot be reached .*no route.* network"),
  )
  def test_hub_says_no(self, error, words):
    package, _ = _hub(error)
    status, num_written, said = _main(f"--push={NAME}", package=package)
    self.assertEqual((status, num_written), (1, 1))
    self.assertRegex(said, words)
    self.assertIn(f"hf upload {NAME} out", said)
    self.assertLen(said.splitlines(), 2)  # What was written, and the error.


if __name__ == "__main__":
  absltest.main()

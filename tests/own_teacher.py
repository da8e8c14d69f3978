"""A teacher of a user's own, for tests of --teacher=module:function."""


def rewrite(question, gold, wrong):
  """The gold solution, whatever was written."""
  del question, wrong
  return gold

"""Losses: pure functions of arrays, `(loss, metrics)` each."""

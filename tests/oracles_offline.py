"""Reference values of the offline and preference losses, by plain loops.

Written from the papers' equations, in float64, and never from the code they
check.
"""

import math

import numpy as np


def token_weights(
  algorithm, log_probs, ref, rewards, advantages, mask, epsilon
):
  """The weights of an offline method; log-ratios held to [-20, 20]."""

  def clip(log_ratio):
    ratio = math.exp(min(max(log_ratio, -20.0), 20.0))
    if epsilon is None:
      return ratio
    return min(max(ratio, 1 - epsilon), 1 + epsilon)

  weights = np.zeros(log_probs.shape)
  for row in range(log_probs.shape[0]):
    times = [t for t in range(log_probs.shape[1]) if mask[row, t]]
    sequence = sum(log_probs[row, t] - ref[row, t] for t in times)
    positive = max(advantages[row], 0.0)
    for t in times:
      token = log_probs[row, t] - ref[row, t]
      weights[row, t] = {
        "nll": 1.0,
        "wbc": rewards[row],
        "r_gold": rewards[row] * max(math.exp(log_probs[row, t]), 0.1),
        "r_lol": rewards[row] * clip(sequence),
        "r_lol_kl": rewards[row],
        "a_lol": positive * clip(sequence),
        "a_lol_ref_free": positive,
        "a_lol_seq": positive * clip(token),
        "a_lol_kl": positive,
      }[algorithm]
  return weights


def weighted_loss(log_probs, weights, ref, mask, kl_coef):
  """Mean over sequences with a token of the weighted sum, and the penalty."""
  losses = []
  for row in range(log_probs.shape[0]):
    times = [t for t in range(log_probs.shape[1]) if mask[row, t]]
    if times:
      loss = -sum(weights[row, t] * log_probs[row, t] for t in times)
      loss += kl_coef * sum(log_probs[row, t] - ref[row, t] for t in times)
      losses.append(loss)
  return sum(losses) / len(losses) if losses else 0.0


def _tokens(log_probs, mask):
  return [float(x) for x, m in zip(log_probs, mask, strict=True) if m]


def _mean(x):
  return sum(x) / len(x) if x else 0.0


def _pairs(log_probs, mask):
  """Sums, means and lengths of every complete pair."""
  for row in range(log_probs.shape[0]):
    chosen = _tokens(log_probs[row, 0], mask[row, 0])
    rejected = _tokens(log_probs[row, 1], mask[row, 1])
    if chosen and rejected:
      yield row, chosen, rejected


def _log_sigmoid(x):
  return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def dpo_loss(log_probs, ref, mask, beta, loss_type, smoothing):
  losses = []
  for row, chosen, rejected in _pairs(log_probs, mask):
    ref_chosen = _tokens(ref[row, 0], mask[row, 0])
    ref_rejected = _tokens(ref[row, 1], mask[row, 1])
    h = sum(chosen) - sum(ref_chosen) - sum(rejected) + sum(ref_rejected)
    right, wrong = -_log_sigmoid(beta * h), -_log_sigmoid(-beta * h)
    losses.append(
      {
        "sigmoid": (1 - smoothing) * right + smoothing * wrong,
        "robust": ((1 - smoothing) * right - smoothing * wrong)
        / (1 - 2 * smoothing),
        "hinge": max(0.0, 1 - beta * h),
        "ipo": (h - 1 / (2 * beta)) ** 2,
      }[loss_type]
    )
  return _mean(losses)


def simpo_loss(log_probs, mask, beta, margin):
  return _mean(
    [
      -_log_sigmoid(beta * (_mean(chosen) - _mean(rejected)) - margin)
      for _, chosen, rejected in _pairs(log_probs, mask)
    ]
  )


def orpo_loss(log_probs, mask, odds_weight):
  def log_odds(tokens):
    probability = math.exp(_mean(tokens))
    return math.log(probability / (1 - probability))

  return _mean(
    [
      -_mean(chosen)
      - odds_weight * _log_sigmoid(log_odds(chosen) - log_odds(rejected))
      for _, chosen, rejected in _pairs(log_probs, mask)
    ]
  )


def cpo_loss(log_probs, mask, beta, nll_weight):
  pairs = list(_pairs(log_probs, mask))
  preference = [
    -_log_sigmoid(beta * (sum(chosen) - sum(rejected)))
    for _, chosen, rejected in pairs
  ]
  tokens = [-x for _, chosen, _ in pairs for x in chosen]
  return _mean(preference) + nll_weight * _mean(tokens)


def kto_loss(log_probs, ref, point, is_desirable, mask, beta, good, bad):
  losses = []
  for row in range(log_probs.shape[0]):
    tokens = _tokens(log_probs[row] - ref[row], mask[row])
    if tokens:
      gain = beta * (sum(tokens) - point)
      if is_desirable[row]:
        losses.append(good * (1 - 1 / (1 + math.exp(-gain))))
      else:
        losses.append(bad * (1 - 1 / (1 + math.exp(gain))))
  return _mean(losses)


def pro_loss(log_probs, rewards, mask, sft_weight):
  """Over the candidates that have tokens, in their order."""
  losses = []
  for row in range(log_probs.shape[0]):
    scores, gains, best = [], [], None
    for k in range(log_probs.shape[1]):
      tokens = _tokens(log_probs[row, k], mask[row, k])
      if tokens:
        scores.append(_mean(tokens))
        gains.append(float(rewards[row, k]))
        best = sum(tokens) if best is None else best
    if len(scores) < 2:
      continue
    loss = -sft_weight * (len(scores) - 1) ** 2 * best
    for k in range(len(scores) - 1):
      later = range(k + 1, len(scores))
      own = scores[k] * max(gains[k] - gains[j] for j in later)
      total = math.exp(own) + sum(
        math.exp(scores[j] * (gains[k] - gains[j])) for j in later
      )
      loss += math.log(total + 1e-10) - own
    losses.append(loss)
  return _mean(losses)


def attention_pooling(hidden, mask, params, num_heads, max_value):
  """Values of prompts; `params` in the head's own names, numpy arrays."""

  def dense(name, x):
    return x @ params[name]["kernel"] + params[name]["bias"]

  values = np.zeros(hidden.shape[0])
  size = hidden.shape[2] // num_heads
  for row in range(hidden.shape[0]):
    real = hidden[row][mask[row]]  # [n, D]
    query = dense("query_projection", params["query"])
    keys = dense("key_projection", real)
    contents = dense("value_projection", real)
    pooled = np.zeros(hidden.shape[2])
    for head in range(num_heads):
      part = slice(head * size, (head + 1) * size)
      scores = keys[:, part] @ query[part] / math.sqrt(size)
      attention = np.exp(scores) / np.exp(scores).sum()
      pooled[part] = attention @ contents[:, part]
    output = dense("dense", dense("output_projection", pooled))[0]
    values[row] = max_value / (1 + math.exp(-output))
  return values

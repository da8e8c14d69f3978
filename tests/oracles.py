"""Reference values by plain loops over float64 numpy.

Written from the papers' equations and never from the code they check.
"""

import numpy as np

# Masked reductions, advantages, rewards, PPO and likelihood losses.


def masked_mean(x, mask):
  total, count = 0.0, 0
  for index in np.ndindex(*x.shape):
    if mask[index]:
      total += float(x[index])
      count += 1
  return total / count if count else 0.0


def masked_variance(x, mask, ddof):
  mean = masked_mean(x, mask)
  total, count = 0.0, 0
  for index in np.ndindex(*x.shape):
    if mask[index]:
      total += (float(x[index]) - mean) ** 2
      count += 1
  return total / max(count - ddof, 1)


def masked_whiten(x, mask, shift_mean, ddof, epsilon):
  mean = masked_mean(x, mask)
  scale = np.sqrt(masked_variance(x, mask, ddof) + epsilon)
  y = np.zeros(x.shape)
  for index in np.ndindex(*x.shape):
    if mask[index]:
      y[index] = (x[index] - mean) / scale + (0.0 if shift_mean else mean)
  return y


def response_mask(response_ids, stop_ids, lengths=None):
  mask = np.zeros(response_ids.shape, bool)
  for row, ids in enumerate(response_ids):
    limit = len(ids) if lengths is None else lengths[row]
    for t in range(limit):
      mask[row, t] = True
      if int(ids[t]) in stop_ids:
        break
  return mask


def gae(rewards, values, mask, discount, gae_lambda):
  """A_t = sum_l (discount lambda)^l delta_{t+l}, over unmasked positions."""
  advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
  for row in range(rewards.shape[0]):
    times = [t for t in range(rewards.shape[1]) if mask[row, t]]
    reward = [float(rewards[row, t]) for t in times]
    value = [float(values[row, t]) for t in times] + [0.0]
    deltas = [
      reward[i] + discount * value[i + 1] - value[i] for i in range(len(times))
    ]
    for i, t in enumerate(times):
      for step, delta in enumerate(deltas[i:]):
        advantages[row, t] += (discount * gae_lambda) ** step * delta
      returns[row, t] = advantages[row, t] + value[i]
  return advantages, returns


def returns_to_go(rewards, mask, discount):
  returns = np.zeros(rewards.shape)
  for row in range(rewards.shape[0]):
    times = [t for t in range(rewards.shape[1]) if mask[row, t]]
    for i, t in enumerate(times):
      for step, later in enumerate(times[i:]):
        returns[row, t] += discount**step * rewards[row, later]
  return returns


def place_score(scores, mask):
  rewards = np.zeros(mask.shape)
  for row, score in enumerate(scores):
    times = [t for t in range(mask.shape[1]) if mask[row, t]]
    if times:
      rewards[row, times[-1]] = score
  return rewards


def kl_penalty(log_probs, ref_log_probs, mask, kl_coef, kind):
  penalty = np.zeros(mask.shape)
  for index in np.ndindex(*mask.shape):
    if mask[index]:
      d = ref_log_probs[index] - log_probs[index]
      estimate = {"k1": -d, "k2": d * d / 2, "k3": np.exp(d) - 1 - d}[kind]
      penalty[index] = -kl_coef * estimate
  return penalty


def adaptive_kl(coef, kl, num_samples, target, horizon):
  error = min(max(kl / target - 1, -0.2), 0.2)
  return coef * (1 + error * num_samples / horizon)


def normalized(token_losses, mask, normalizer):
  """Average of token losses, by one of the papers' normalizers."""
  num_rows, num_columns = mask.shape
  sums = [
    sum(float(token_losses[i, t]) for t in range(num_columns) if mask[i, t])
    for i in range(num_rows)
  ]
  counts = [int(mask[i].sum()) for i in range(num_rows)]
  filled = [i for i in range(num_rows) if counts[i]]
  if not filled:
    return 0.0
  if normalizer == "token_mean":
    return sum(sums) / sum(counts)
  if normalizer == "sequence_mean":
    return sum(sums[i] / counts[i] for i in filled) / len(filled)
  if normalizer == "sequence_sum":
    return sum(sums) / len(filled)
  if normalizer == "constant":
    return sum(sums) / (num_rows * num_columns)
  raise KeyError(normalizer)


def clipped_policy_loss(
  log_probs, old_log_probs, advantages, mask, low, high, normalizer
):
  """Returns the loss, the clipped share, and mean and largest ratio."""
  token_losses = np.zeros(mask.shape)
  is_clipped, ratios = np.zeros(mask.shape), np.zeros(mask.shape)
  for index in np.ndindex(*mask.shape):
    if mask[index]:
      ratio = np.exp(log_probs[index] - old_log_probs[index])
      clipped = min(max(ratio, 1 - low), 1 + high)
      first, second = -advantages[index] * ratio, -advantages[index] * clipped
      token_losses[index] = max(first, second)
      is_clipped[index] = second > first
      ratios[index] = ratio
  return (
    normalized(token_losses, mask, normalizer),
    masked_mean(is_clipped, mask),
    masked_mean(ratios, mask),
    ratios.max(),
  )


def clipped_value_loss(values, old_values, returns, mask, epsilon):
  """Returns the loss, the clipped share and the explained variance."""
  squares, is_clipped = np.zeros(mask.shape), np.zeros(mask.shape)
  for index in np.ndindex(*mask.shape):
    if mask[index]:
      v, v_old, target = values[index], old_values[index], returns[index]
      v_clip = min(max(v, v_old - epsilon), v_old + epsilon)
      squares[index] = max((v - target) ** 2, (v_clip - target) ** 2)
      is_clipped[index] = (v_clip - target) ** 2 > (v - target) ** 2
  variance = masked_variance(returns, mask, 0)
  residual = masked_variance(returns - values, mask, 0)
  return (
    0.5 * masked_mean(squares, mask),
    masked_mean(is_clipped, mask),
    1 - residual / variance if variance else 0.0,
  )


def nll_loss(log_probs, mask, normalizer, weights=None):
  weights = np.ones(mask.shape) if weights is None else weights
  return normalized(-weights * log_probs, mask, normalizer)


def probabilities(logits, temperature=1.0, allowed=None):
  """softmax(logits / τ) over the allowed tokens of one `[V]` row."""
  logits = np.asarray(logits, np.float64)
  allowed = np.ones(logits.shape, bool) if allowed is None else allowed
  largest = max(z for z, may in zip(logits, allowed, strict=True) if may)
  weights = np.zeros(logits.shape)
  for k, z in enumerate(logits):
    if allowed[k]:
      weights[k] = np.exp((z - largest) / temperature)
  return weights / weights.sum()


def entropy_of(probs):
  return sum(-p * np.log(p) for p in probs if p > 0)


def token_log_probs(logits, ids, temperature=1.0, allowed=None):
  log_probs = np.zeros(ids.shape)
  for b, t in np.ndindex(*ids.shape):
    probs = probabilities(logits[b, t], temperature, allowed)
    log_probs[b, t] = np.log(probs[ids[b, t]])
  return log_probs


def entropies(logits, temperature=1.0, allowed=None):
  shape = logits.shape[:2]
  result = np.zeros(shape)
  for b, t in np.ndindex(*shape):
    result[b, t] = entropy_of(probabilities(logits[b, t], temperature, allowed))
  return result


def kl_estimate(log_probs, ref_log_probs, kind):
  result = np.zeros(log_probs.shape)
  for index in np.ndindex(*log_probs.shape):
    ratio = np.exp(ref_log_probs[index] - log_probs[index])
    if kind == "k1":
      result[index] = -np.log(ratio)
    elif kind == "k2":
      result[index] = 0.5 * np.log(ratio) ** 2
    else:
      result[index] = ratio - 1 - np.log(ratio)
  return result


def batch_entropy(
  logits, mask, mode, temperature=1.0, allowed=None, epsilon=None
):
  """Returns the value of `mode`, H_bat, the largest share and H_tok."""
  batch, length, vocab_size = logits.shape
  if mode == "pooled":
    groups = [[(b, t) for b in range(batch) for t in range(length)]]
  elif mode == "last":
    groups = [
      [(b, max(np.flatnonzero(mask[b]), default=0)) for b in range(batch)]
    ]
  else:
    groups = [[(b, t) for b in range(batch)] for t in range(length)]
  count, h_batch, h_token, largest = 0, 0.0, 0.0, 0.0
  for group in groups:
    alive = [index for index in group if mask[index]]
    if not alive:
      continue
    mean = np.zeros(vocab_size)
    for index in alive:
      probs = probabilities(logits[index], temperature, allowed)
      mean += probs / len(alive)
      h_token += entropy_of(probs)
    count += len(alive)
    largest += len(alive) * mean.max()
    if epsilon is None:
      h_batch += len(alive) * entropy_of(mean)
    else:
      h_batch -= len(alive) * sum(p * np.log(p + epsilon) for p in mean)
  count = max(count, 1)
  h_batch, h_token, largest = h_batch / count, h_token / count, largest / count
  value = h_batch - h_token if mode == "mi" else h_batch
  return value, h_batch, largest, h_token


def kept_by_top_k(logits, k):
  """Tokens of one `[V]` row with fewer than k strictly more likely ones."""
  return np.array([sum(other > z for other in logits) < k for z in logits])


def kept_by_top_p(logits, p):
  """Tokens of one `[V]` row that less than p of the mass is ahead of."""
  probs = probabilities(logits)
  return np.array([sum(q for q in probs if q > each) < p for each in probs])


def kept_by_min_p(logits, p):
  probs = probabilities(logits)
  return np.array([each >= p * max(probs) for each in probs])

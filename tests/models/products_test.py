"""Products in the model's precision, forwards and backwards."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn

from rljax.models import linear, products
from rljax.plan import flops
from tests import tiny


def _arrays(dtype):
  rng = np.random.default_rng(0)
  left, right = rng.normal(size=(5, 6, 8)), rng.normal(size=(9, 8))
  return jnp.asarray(left, dtype), jnp.asarray(right, dtype)


def _loss(einsum, left, right):
  return jnp.sum(jnp.sin(einsum("bsd,vd->bsv", left, right)))


def _plain(equation, left, right):
  return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


class EinsumTest(parameterized.TestCase):
  def test_float32_is_the_plain_product(self):
    arrays = _arrays(jnp.float32)
    both = (
      jax.jit(jax.value_and_grad(functools.partial(_loss, x), argnums=(0, 1)))
      for x in (products.einsum, _plain)
    )
    for a, b in zip(*(jax.tree.leaves(x(*arrays)) for x in both), strict=True):
      np.testing.assert_array_equal(a, b)

  def test_bfloat16_agrees_to_rounding(self):
    arrays = _arrays(jnp.bfloat16)
    value, grads = jax.value_and_grad(
      functools.partial(_loss, products.einsum), argnums=(0, 1)
    )(*arrays)
    expected, exact = jax.value_and_grad(
      functools.partial(_loss, _plain), argnums=(0, 1)
    )(*(x.astype(jnp.float32) for x in arrays))
    self.assertEqual(value.dtype, jnp.float32)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted, array in zip(grads, exact, arrays, strict=True):
      self.assertEqual(found.dtype, jnp.bfloat16)
      self.assertEqual(found.shape, array.shape)
      scale = float(jnp.abs(wanted).max())
      np.testing.assert_allclose(
        found.astype(jnp.float32), wanted, atol=0.02 * scale
      )

  @parameterized.parameters("gpt2", "llama")
  def test_no_float32_product_in_a_bfloat16_model(self, name):
    config = getattr(tiny, f"{name}_config")(dtype=jnp.bfloat16)
    model, params = tiny.model(config), tiny.shapes(config)
    ids, mask = tiny.batch(0, (2, 6))

    def loss(params):
      hidden = model.apply({"params": params}, ids, mask)
      logits = model.apply({"params": params}, hidden, method="logits")
      return jnp.sum(jax.nn.log_softmax(logits)[..., 0])

    found = flops.count(jax.jit(jax.grad(loss)).trace(params).jaxpr)
    self.assertGreater(found.total, 0)
    self.assertEqual(found.wide, 0, found.widest)


class MergedTest(absltest.TestCase):
  def test_a_kernel_is_summed_for_over_one_dimension(self):
    """Of two, XLA copies what was read, transposed, on a CPU."""
    layer = linear.dense(tiny.llama_config(), 8)
    plain = nn.Dense(8)
    x = jax.random.normal(jax.random.key(0), (3, 5, 16))
    params = plain.init(jax.random.key(1), x)

    def gradient(layer):
      loss = lambda params, x: jnp.sum(jnp.square(layer.apply(params, x)))
      return jax.jit(jax.grad(loss, (0, 1)))

    chex.assert_trees_all_equal(
      gradient(layer)(params, x), gradient(plain)(params, x)
    )
    self.assertEqual(
      layer.apply(params, x[0, 0]).shape, plain.apply(params, x[0, 0]).shape
    )
    for each, expected in ((layer, False), (plain, True)):
      text = str(jax.make_jaxpr(gradient(each))(params, x))
      self.assertEqual("([0, 1], [0, 1])" in text, expected)


class PrecisionTest(absltest.TestCase):
  def test_products_are_exact_where_operands_keep_their_bits(self):
    self.assertTrue(products.is_exact(jnp.float32))  # On a CPU.
    self.assertFalse(products.is_exact(jnp.bfloat16))
    for name, expected in (("highest", True), ("default", False)):
      with jax.default_matmul_precision(name):
        self.assertEqual(products.is_exact(jnp.float32), expected)

  def test_rounded_stays_in_the_program(self):
    """A compiler may drop a conversion to bfloat16 and back, but not this."""
    x = jnp.linspace(1, 2, 257, dtype=jnp.bfloat16)
    text = jax.jit(products.rounded).lower(x).as_text()
    self.assertIn("reduce_precision", text)
    np.testing.assert_array_equal(products.rounded(x), x)
    x = jnp.linspace(1, 2, 257)
    self.assertIs(products.rounded(x), x)


class NarrowedTest(absltest.TestCase):
  def test_matrices_alone(self):
    params = tiny.params(tiny.llama_config())
    found = products.narrowed(params, jnp.bfloat16, ("q_proj",))
    attention = found["layers_0"]["self_attn"]
    self.assertEqual(attention["k_proj"]["kernel"].dtype, jnp.bfloat16)
    self.assertEqual(attention["q_proj"]["kernel"].dtype, jnp.float32)
    self.assertEqual(found["norm"]["scale"].dtype, jnp.float32)
    same = products.narrowed(params, jnp.float32)
    self.assertIs(same["norm"]["scale"], params["norm"]["scale"])

  def test_models_compute_the_same_with_them(self):
    """The trainer reads the parameters as they are."""
    for config in (
      tiny.gpt2_config(dtype=jnp.bfloat16),
      tiny.llama_config(dtype=jnp.bfloat16),
      tiny.llama_config(dtype=jnp.bfloat16, model_type="qwen3"),
      tiny.llama_config(dtype=jnp.bfloat16, tie_word_embeddings=False),
    ):
      model, params = tiny.model(config), tiny.params(config)
      ids, mask = tiny.batch(0, (2, 6))

      @jax.jit
      def logits(params, model=model, ids=ids, mask=mask):
        hidden = model.apply({"params": params}, ids, mask)
        return model.apply({"params": params}, hidden, method="logits")

      narrow = products.narrowed(params, jnp.bfloat16)
      np.testing.assert_array_equal(logits(params), logits(narrow))


if __name__ == "__main__":
  absltest.main()

"""Operations of products, counted by hand."""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from rljax.models import attention
from rljax.plan import flops


def _count(function, *args):
  return flops.count(jax.jit(function).trace(*args).jaxpr)


class CountTest(parameterized.TestCase):
  def test_products_by_hand(self):
    x, y = jnp.ones((3, 5)), jnp.ones((5, 7))
    # 2 * 3 * 5 * 7, and with a batch of four as often again.
    self.assertEqual(_count(jnp.matmul, x, y).total, 210)
    batched = lambda x, y: jnp.einsum("bij,jk->bik", x, y)
    self.assertEqual(_count(batched, jnp.ones((4, 3, 5)), y).total, 840)

  def test_gradients_cost_twice_as_much_again(self):
    x, y = jnp.ones((3, 5)), jnp.ones((5, 7))
    loss = lambda x, y: jnp.sum(jnp.square(x @ y))
    found = _count(jax.grad(loss, argnums=(0, 1)), x, y)
    self.assertEqual(found.total, 630)

  def test_loops(self):
    x = jnp.ones((4, 4))

    def scanned(x):
      return jax.lax.scan(lambda c, _: (c @ c, None), x, length=6)[0]

    def until(x):
      def goes_on(carry):
        step, x = carry
        return (step < 9) & jnp.any(x > 0)

      body = lambda carry: (carry[0] + 1, carry[1] @ carry[1])
      return jax.lax.while_loop(goes_on, body, (0, x @ x))

    one = 2 * 4**3
    found = _count(scanned, x)
    self.assertEqual((found.outside, found.tokens), (6 * one, 0))
    self.assertEqual(found.rounds, 0)
    found = _count(until, x)
    self.assertEqual((found.outside, found.tokens), (one, 9 * one))
    self.assertEqual(found.rounds, 9)

  def test_remat_is_counted(self):
    x = jnp.ones((4, 4))

    def loss(x):
      inner = jax.checkpoint(lambda x: jnp.sin(x @ x))
      return jnp.sum(inner(x))

    plain = _count(jax.grad(lambda x: jnp.sum(jnp.sin(x @ x))), x).total
    self.assertEqual(_count(jax.grad(loss), x).total, plain + 2 * 4**3)

  def test_wide_products(self):
    narrow = jnp.ones((4, 4), jnp.bfloat16)
    wide = jnp.ones((4, 2))

    def both(narrow, wide):
      return narrow @ narrow, wide.T @ wide

    found = _count(both, narrow, wide)
    self.assertEqual(found.wide, 2 * 2 * 4 * 2)
    self.assertEqual(found.widest, "float32[2, 4] x float32[4, 2]")

  @parameterized.parameters(("plain", 6), ("blocks", 7), ("splash", 9))
  def test_attention(self, form, products):
    batch, length, heads, width = 2, 256, 4, 8
    shape = lambda heads: jax.ShapeDtypeStruct(
      (batch, length, heads, width), jnp.float32
    )
    mask = jax.ShapeDtypeStruct((batch, length), bool)

    def loss(*operands):
      return jnp.sum(attention.attend(*operands, form=form))

    found = _count(
      jax.grad(loss, (0, 1, 2)), shape(4), shape(2), shape(2), mask
    )
    one = 2 * batch * heads * length**2 * width
    # The kernel's sums over rows are products with few columns.
    self.assertAlmostEqual(found.total / one, products, places=2)
    self.assertEqual(found.tokens, 0)
    # What a kernel does inside is not told to be a wide product.
    self.assertEqual(found.wide > one, form != "splash")


if __name__ == "__main__":
  absltest.main()

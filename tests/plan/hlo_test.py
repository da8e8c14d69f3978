"""What is read from the text of compiled modules, by hand."""

# ruff: noqa: E501 (instructions stand on one line.)

from absl.testing import absltest

from rljax.plan import hlo

# A loop of five rounds over tokens, which gathers a parameter, converts
# another one, copies 1 MB, and computes logits of all eight rows.
MODULE = """HloModule jit_sample, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%narrow (p0: f32[512,512]) -> bf16[512,512] {
  %p0 = f32[512,512]{1,0} parameter(0)
  ROOT %c = bf16[512,512]{1,0} convert(%p0)
}

%body (s: (s32[], f32[512,512], f32[256,256], f32[8,1024])) -> (s32[], f32[512,512], f32[256,256], f32[8,1024]) {
  %s = (s32[], f32[512,512]{1,0}, f32[256,256]{1,0}, f32[8,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = f32[512,512]{1,0} get-tuple-element(%s), index=1
  %v = f32[256,256]{1,0} get-tuple-element(%s), index=2
  %l = f32[8,1024]{1,0} get-tuple-element(%s), index=3
  %n = bf16[512,512]{1,0} fusion(%w), kind=kLoop, calls=%narrow
  %g = f32[1024,256]{1,0} all-gather(%v), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %big = f32[1024,256]{0,1} copy(%g)
  %r = f32[8,1024]{1,0} all-reduce(%l), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[], f32[512,512]{1,0}, f32[256,256]{1,0}, f32[8,1024]{1,0}) tuple(%i, %w, %v, %r)
}

%condition (s.1: (s32[], f32[512,512], f32[256,256], f32[8,1024])) -> pred[] {
  %s.1 = (s32[], f32[512,512]{1,0}, f32[256,256]{1,0}, f32[8,1024]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

ENTRY %main (x: s32[], w.1: f32[512,512], v.1: f32[256,256], l.1: f32[8,1024]) -> f32[8,1024] {
  %x = s32[] parameter(0)
  %w.1 = f32[512,512]{1,0} parameter(1)
  %v.1 = f32[256,256]{1,0} parameter(2)
  %l.1 = f32[8,1024]{1,0} parameter(3)
  %start = (s32[], f32[512,512]{1,0}, f32[256,256]{1,0}, f32[8,1024]{1,0}) tuple(%x, %w.1, %v.1, %l.1)
  %loop = (s32[], f32[512,512]{1,0}, f32[256,256]{1,0}, f32[8,1024]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,1024]{1,0} get-tuple-element(%loop), index=3
}
"""
KNOWN = MODULE.replace(
  "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
)
MB = 2**20


class MeasureTest(absltest.TestCase):
  def test_loop_over_tokens(self):
    found = hlo.measure(MODULE, token_loops=[5], vocab_size=1024, rows=4)
    self.assertEqual(found.rounds, 5)
    self.assertEqual(found.outside.traffic, 0)
    # A round: the conversion reads 1 MB and writes half; the gather reads 1/4
    # MB and writes 1; the copy reads and writes 1; the sum 32 kB each.
    of_a_round = 1.5 * MB + 1.25 * MB + 2 * MB + 2 * 32 * 1024
    self.assertEqual(found.tokens.traffic, 5 * of_a_round)
    self.assertEqual(
      dict(found.tokens.collectives),
      {("all-gather", 1): [5, 5 * MB], ("all-reduce", 1): [5, 5 * 32 * 1024]},
    )
    # Of four devices each gets three quarters; of two, half, there and back.
    sent = 5 * (0.75 * MB + 2 * 0.5 * 32 * 1024)
    self.assertEqual(found.tokens.link_bytes, sent)

  def test_warnings(self):
    found = hlo.measure(MODULE, token_loops=[5], vocab_size=1024, rows=4)
    text = "\n".join(found.warnings)
    self.assertLen(found.warnings, 4, text)
    self.assertIn("parameters are gathered in the loop over tokens, 5 MB", text)
    self.assertIn("parameters are converted inside a loop, 5 MB read", text)
    self.assertIn("copies of 1 MB and more inside of loops, 10 MB", text)
    self.assertRegex(text, "logits of more rows or tokens than its share")
    # All eight rows are its share.
    found = hlo.measure(MODULE, token_loops=[5], vocab_size=1024, rows=8)
    self.assertNotRegex("\n".join(found.warnings), "logits")

  def test_other_loops(self):
    for text, rounds in ((MODULE, 5), (KNOWN, 7)):
      found = hlo.measure(text)
      self.assertEqual(found.rounds, 0)
      self.assertEqual(found.tokens.traffic, 0)
      number, _ = found.outside.collectives["all-gather", 1]
      self.assertEqual(number, rounds)
      self.assertNotRegex("\n".join(found.warnings), "gathered")

  def test_what_a_fusion_reads_of_an_array(self):
    """One row of a cache is written and one read, not the cache."""
    text = """HloModule cache

%write (p: f32[1024,1024], u: f32[1,1024], i: s32[]) -> f32[1024,1024] {
  %p = f32[1024,1024]{1,0} parameter(0)
  %u = f32[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = f32[1024,1024]{1,0} dynamic-update-slice(%p, %u, %i, %i)
}

%read (q: f32[1024,1024], j: s32[]) -> f32[1,1024] {
  %q = f32[1024,1024]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %s = f32[1,1024]{1,0} dynamic-slice(%q, %j, %j), dynamic_slice_sizes={1,1024}
  ROOT %m = f32[1,1024]{1,0} multiply(%s, %s)
}

ENTRY %main (x: f32[1024,1024], y: f32[1,1024], k: s32[]) -> f32[1,1024] {
  %x = f32[1024,1024]{1,0} parameter(0)
  %y = f32[1,1024]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %w = f32[1024,1024]{1,0} fusion(%x, %y, %k), kind=kLoop, calls=%write
  ROOT %r = f32[1,1024]{1,0} fusion(%w, %k), kind=kLoop, calls=%read
}
"""
    found = hlo.measure(text)
    self.assertEqual(found.outside.traffic, 4 * 4096 + 2 * 4)

  def test_what_is_computed_for_a_few_elements(self):
    """Numbers that a fusion makes where a gather asks, and all of others."""
    text = """HloModule draw

%chosen (p: f32[256,1024], m: f32[256], i: s32[256,1]) -> f32[256,1] {
  %p = f32[256,1024]{1,0} parameter(0)
  %m = f32[256]{0} parameter(1)
  %i = s32[256,1]{1,0} parameter(2)
  %b = f32[256,1024]{1,0} broadcast(%m), dimensions={0}
  %s = f32[256,1024]{1,0} subtract(%p, %b)
  ROOT %g = f32[256,1]{1,0} gather(%s, %i), slice_sizes={1,1}
}

%both (q: f32[256,1024], j: s32[256,1]) -> (f32[256,1024], f32[256,1]) {
  %q = f32[256,1024]{1,0} parameter(0)
  %j = s32[256,1]{1,0} parameter(1)
  %e = f32[256,1024]{1,0} exponential(%q)
  %h = f32[256,1]{1,0} gather(%e, %j), slice_sizes={1,1}
  ROOT %t = (f32[256,1024]{1,0}, f32[256,1]{1,0}) tuple(%e, %h)
}

ENTRY %main (x: f32[256,1024], y: f32[256], k: s32[256,1]) -> f32[256,1024] {
  %x = f32[256,1024]{1,0} parameter(0)
  %y = f32[256]{0} parameter(1)
  %k = s32[256,1]{1,0} parameter(2)
  %c = f32[256,1]{1,0} fusion(%x, %y, %k), kind=kLoop, calls=%chosen
  ROOT %f = (f32[256,1024]{1,0}, f32[256,1]{1,0}) fusion(%x, %k), kind=kLoop, calls=%both
}
"""
    few, whole = 256 * 4, MB
    # What is read of x and y, the indices, and what is written.
    self.assertEqual(
      hlo.measure(text).outside.traffic, 4 * few + 2 * whole + 2 * few
    )

  def test_memory_on_the_chip_is_not_traffic(self):
    text = """HloModule chip

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0:T(8,128)} parameter(0)
  %y = f32[8,8]{1,0:T(8,128)S(1)} negate(%x)
  ROOT %z = f32[8,8]{1,0:T(8,128)} negate(%y)
}
"""
    self.assertEqual(hlo.measure(text).outside.traffic, 2 * 256)

  def test_attribute_of_several_lines(self):
    """As Pallas writes those of a kernel."""
    text = """HloModule kernel

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} custom-call(%x), frontend_attributes={kernel_metadata={
"block":"512"
}}, metadata={op_name="kernel"}
  ROOT %z = f32[8,8]{1,0} negate(%y)
}
"""
    self.assertEqual(hlo.measure(text).outside.traffic, 4 * 256)

  def test_sum_of_which_a_part_is_kept(self):
    """As a TPU scatters a sum, in one fusion."""
    text = """HloModule scatter

%scatter (p: f32[1024]) -> f32[256] {
  %p = f32[1024]{0} parameter(0)
  %r = f32[1024]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %d = f32[256]{0} dynamic-slice(%r), dynamic_slice_sizes={256}
}

ENTRY %main (x: f32[1024]) -> f32[256] {
  %x = f32[1024]{0} parameter(0)
  ROOT %f = f32[256]{0} fusion(%x), kind=kCustom, calls=%scatter
}
"""
    found = hlo.measure(text).outside
    self.assertEqual(
      dict(found.collectives), {("reduce-scatter", 0): [1, 4096]}
    )
    self.assertEqual(found.link_bytes, 0.75 * 4096)

  def test_collectives_that_run_beside_others(self):
    """Their values have what goes in, too, but for sums."""
    text = """HloModule starts

ENTRY %main (a: f32[8], b: f32[16]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %g = ((f32[8]{0}, f32[16]{0}), (f32[32]{0}, f32[64]{0})) all-gather-start(%a, %b), replica_groups=[1,4]<=[4], dimensions={0}
  %s = ((f32[16]{0}), f32[4]{0}) reduce-scatter-start(%b), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
  %p = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}
  %r = (f32[8]{0}, f32[16]{0}) all-reduce-start(%a, %b), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %z = f32[8]{0} negate(%a)
}
"""
    found = hlo.measure(text).outside.collectives
    self.assertEqual(
      {kind: size for (kind, _), (_, size) in found.items()},
      {
        "all-gather": 4 * 96,
        "reduce-scatter": 4 * 16,
        "collective-permute": 4 * 8,
        "all-reduce": 4 * 24,
      },
    )

  def test_groups_of_a_mesh(self):
    line = (
      "ENTRY %main (x: f32[256]) -> f32[1024] {\n"
      "  %x = f32[256]{0} parameter(0)\n"
      "  ROOT %g = f32[1024]{0} all-gather(%x), replica_groups="
      "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}\n}\n"
    )
    self.assertEqual(hlo.measure(line).outside.link_bytes, 0.75 * 4096)


if __name__ == "__main__":
  absltest.main()

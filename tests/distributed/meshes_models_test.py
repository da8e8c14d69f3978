"""Models on a mesh: where their parameters lie, and how they are sampled from.

The compiled programs are read as text: what they gather cannot be seen from
the outside.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from rljax.distributed import compiled, meshes
from rljax.generation import decode, rollouts
from rljax.models import classifier, encoder, gpt2, heads, hf, llama
from rljax.ops import sampling
from rljax.training import preflight
from tests import conftest, tiny

MESH = "data:2,fsdp:2,tensor:2"
# Sizes by which the matrices can be told from what the layers compute.
SIZES = {"hidden_size": 64, "vocab_size": 112}
GPT2 = gpt2.GPT2Config(**SIZES, num_layers=1, num_heads=4, max_positions=32)
LLAMA = llama.LlamaConfig(
  **SIZES,
  num_layers=1,
  num_heads=4,
  num_kv_heads=2,
  head_dim=24,
  intermediate_size=80,
  max_positions=32,
  model_type="qwen2",
  tie_word_embeddings=False,
)
ENCODER = encoder.EncoderConfig(
  **SIZES,
  num_layers=1,
  num_heads=4,
  intermediate_size=128,
  max_positions=32,
  labels=("bad", "good"),
)
NUM_PROMPTS, PROMPT_LENGTH, NUM_SAMPLES, LENGTH = 4, 3, 2, 7


def _models():
  return {
    "gpt2": gpt2.GPT2(GPT2),
    "llama": llama.Llama(LLAMA),
    "encoder": encoder.Encoder(ENCODER),
    "classifier of gpt2": _classifier(GPT2),
    "classifier of llama": _classifier(LLAMA),
  }


def _classifier(backbone):
  return classifier.CausalClassifier(
    classifier.CausalClassifierConfig(backbone, ("LABEL_0",))
  )


def _shapes(model):
  ids = jnp.zeros((1, 2), jnp.int32)
  init = functools.partial(model.init, jax.random.key(0), ids, ids == 0)
  return jax.eval_shape(init)["params"]


def _split(model):
  """path -> (shape, spec) of the parameters that are split on `MESH`."""
  mesh = meshes.make(MESH)
  shapes = _shapes(model)
  found = meshes.shardings(shapes, hf.partition_rules(model, mesh), mesh)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      leaf.shape,
      sharding.spec,
    )
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(shapes),
      jax.tree.leaves(found),
      strict=True,
    )
    if sharding.spec != P()
  }


class RulesTest(parameterized.TestCase):
  @parameterized.parameters(*_models())
  def test_every_matrix_is_split_both_ways(self, name):
    model = _models()[name]
    split = _split(model)
    whole = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(_shapes(model)):
      path = jax.tree_util.keystr(path, simple=True, separator="/")
      axes = set(split[path][1]) if path in split else set()
      if leaf.ndim < 2:
        self.assertLessEqual(axes, {"tensor", None}, path)
      elif axes != {"fsdp", "tensor"}:
        self.assertEmpty(axes, path)
        whole.append(path.split("/")[0 if "score" in path else -2])
    # Small ones: tables of positions and kinds, heads of one or two labels.
    self.assertContainsSubset(
      whole,
      {"wpe", "score", "classifier", "pooler"}
      | {"position_embeddings", "token_type_embeddings"},
    )

  def test_heads_and_optimizer_follow(self):
    """The tree that ppo.py trains, with the state of its optimizer."""
    model = llama.Llama(LLAMA)
    params = {
      "policy": _shapes(model),
      "critic": _shapes(model),
      "value_head": jax.eval_shape(
        heads.ValueHead().init, jax.random.key(0), jnp.zeros((1, 64))
      )["params"],
    }
    state = {
      "params": params,
      "optimizer": jax.eval_shape(optax.adamw(1e-3).init, params),
    }
    mesh = meshes.make(MESH)
    found = meshes.shardings(state, hf.partition_rules(model, mesh), mesh)
    params = found["params"]
    self.assertEqual(found["optimizer"][0].mu, params)
    self.assertEqual(found["optimizer"][0].nu, params)
    self.assertEqual(params["critic"], params["policy"])
    self.assertEqual(
      params["policy"]["layers_0"]["mlp"]["down_proj"]["kernel"].spec,
      P("tensor", "fsdp"),
    )
    for sharding in jax.tree.leaves(params["value_head"]):
      self.assertEqual(sharding.spec, P())

  @parameterized.parameters(
    ("llama", "2 key and value heads of a Llama", "1 or 2"),
    ("classifier of llama", "2 key and value heads of a Causal", "1 or 2"),
    ("gpt2", "4 query heads of a GPT2", "1 or 2 or 4"),
    ("encoder", "4 query heads of a Encoder", "1 or 2 or 4"),
  )
  def test_heads_that_tensor_does_not_divide(self, name, which, sizes):
    model = _models()[name]
    mesh = meshes.make("tensor:4" if "2 key" in which else "tensor:8")
    with self.assertRaisesRegex(
      ValueError,
      f"the {which}.* the {mesh.size} devices of tensor; change "
      f"tensor in --mesh to {sizes}.$",
    ):
      hf.partition_rules(model, mesh)

  def test_vocabulary_that_tensor_does_not_divide(self):
    """Its rows are split by their width, if that divides."""
    mesh = meshes.make("fsdp:4,tensor:2")
    for width, fits in ((24, True), (20, False)):
      config = tiny.gpt2_config(vocab_size=41, hidden_size=width)
      model = tiny.model(config)
      rules = hf.partition_rules(model, mesh)
      if fits:
        found = meshes.shardings(_shapes(model), rules, mesh)
        shard = found["wte"]["embedding"].shard_shape((41, width))
        self.assertEqual(shard, (41, 3))
        continue
      with self.assertRaisesRegex(
        ValueError,
        "dimension 1 of wte/embedding, of size 20, is not divisible by the 8 "
        "devices of fsdp x tensor; change fsdp or tensor in --mesh",
      ):
        meshes.shardings(_shapes(model), rules, mesh)


class SamplerTest(parameterized.TestCase):
  @parameterized.parameters("gpt2", "llama")
  def test_samples_on_the_mesh(self, name):
    """The same tokens; the cache split, the parameters gathered nowhere."""
    model, mesh = _models()[name], meshes.make(MESH)
    params = tiny.params(model.config)
    rng = np.random.default_rng(0)
    shape = (NUM_PROMPTS, PROMPT_LENGTH)
    ids = rng.integers(0, 112, shape).astype(np.int32)
    mask = np.arange(PROMPT_LENGTH) >= rng.integers(0, 3, NUM_PROMPTS)[:, None]
    program = self._program(model)
    expected = program(jax.random.key(1), params, ids, mask)
    program = self._program(
      model,
      split_cache=meshes.cache_splitter(mesh),
      split_logits=meshes.logits_splitter(mesh),
    )
    placed = meshes.place(
      params, meshes.shardings(params, hf.partition_rules(model, mesh), mesh)
    )
    # Prompts that every device has: the rows are for the sampler to split.
    key, *prompts = meshes.replicate((jax.random.key(1), ids, mask), mesh)
    args = (key, placed, *prompts)
    found = program(*args)
    np.testing.assert_array_equal(found.response_ids, expected.response_ids)
    np.testing.assert_allclose(
      found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5
    )
    self.assertGreater(len(np.unique(found.response_ids)), 10)
    entry, body = _loop(program.compile(*args).as_text())
    self._check_cache(model.config, body)
    self._check_gathers(model, entry, body)
    grown = self._program(
      model,
      cache_parts=2,
      split_cache=meshes.cache_splitter(mesh),
      split_logits=meshes.logits_splitter(mesh),
    )
    found = grown(*args)
    np.testing.assert_array_equal(found.response_ids, expected.response_ids)
    lines = grown.compile(*args).as_text().splitlines()
    loops = [line for line in lines if re.search(r"\bwhile\(", line)]
    num_rows = NUM_PROMPTS * NUM_SAMPLES
    for room in decode.cache_rooms(LENGTH, 2):  # Each is split.
      arrays = re.findall(rf"f32\[(\d+),\d+,{room},\d+\]", " ".join(loops))
      self.assertEqual(set(arrays), {str(num_rows // 4)})

  def test_logits_are_split(self):
    """A device draws its own rows, rather than those of all of fsdp."""
    model, mesh = _models()["llama"], meshes.make(MESH)
    rules = hf.partition_rules(model, mesh)
    shapes = _shapes(model)
    params = meshes.place(
      jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes),
      meshes.shardings(shapes, rules, mesh),
    )
    ids = np.zeros((NUM_PROMPTS, PROMPT_LENGTH), np.int32)
    program = self._program(
      model,
      split_cache=meshes.cache_splitter(mesh),
      split_logits=meshes.logits_splitter(mesh),
    )
    args = meshes.replicate((jax.random.key(1), ids, ids == 0), mesh)
    text = program.compile(args[0], params, *args[1:]).as_text()
    _, body = _loop(text)
    of_draws = re.compile(r"jit\(nan_to_num\)|/body/exp\"")
    drawing = "\n".join(line for line in body if of_draws.search(line))
    share = model.config.vocab_size // mesh.shape["tensor"]
    sizes = f"{model.config.vocab_size}|{share}"
    rows = re.findall(rf"f32\[(\d+),(?:{sizes})\]", drawing)
    num_rows = NUM_PROMPTS * NUM_SAMPLES // meshes.num_batch_shards(mesh)
    self.assertEqual(set(rows), {str(num_rows)})

  def _program(self, model, **splitters):
    return compiled.Compiled(
      "sample",
      lambda key, params, ids, mask: rollouts.sample(
        key,
        model,
        params,
        ids,
        mask,
        max_length=LENGTH,
        settings=sampling.Settings(temperature=2.0),
        num_samples=NUM_SAMPLES,
        **splitters,
      ),
    )

  def _check_cache(self, config, body):
    """Rows over data x fsdp, heads over tensor, in what the loop carries."""
    num_heads = getattr(config, "num_kv_heads", config.num_heads)
    width = getattr(config, "head_dim", 16)
    carried = body[0]
    for num_rows, length in (
      (NUM_PROMPTS * NUM_SAMPLES, LENGTH),
      (NUM_PROMPTS, PROMPT_LENGTH),
    ):
      arrays = re.findall(rf"f32\[(\d+),(\d+),{length},{width}\]", carried)
      split = (str(num_rows // 4), str(num_heads // 2))
      self.assertEqual(arrays, [split] * 2 * config.num_layers)

  def _check_gathers(self, model, entry, body):
    smallest, forbidden = math.inf, set()
    for (rows, columns), spec in (
      value for value in _split(model).values() if len(value[0]) == 2
    ):
      smallest = min(smallest, rows * columns)
      at = tuple(spec).index("tensor")
      for share in (1, 2):  # Whatever fsdp does, tensor must not be whole.
        forbidden.add(
          (rows, columns // share) if at == 0 else (rows // share, columns)
        )
    gathered = _gathered(entry) + _gathered(body)
    self.assertNotEmpty(gathered)
    self.assertEmpty(forbidden & set(gathered))
    # A token costs less than half of the smallest matrix: what moves are
    # activations, over fsdp too.
    for shape in _gathered(body):
      self.assertLess(math.prod(shape), smallest / 2, shape)


def _loop(text):
  """Lines of the entry, and of its longest loop with what that carries."""
  blocks, lines = {}, []
  for line in text.splitlines():
    if line.endswith("{") and not line.startswith(" "):
      name = line.removeprefix("ENTRY ").split()[0].removeprefix("%")
      lines = [line]
      blocks[name] = lines
      if line.startswith("ENTRY"):
        entry = lines
    else:
      lines.append(line)
  loops = [line for line in entry if re.search(r"\bwhile\(", line)]
  longest = max(loops, key=len)
  body = blocks[re.search(r"body=%?([\w.\-]+)", longest)[1]]
  return entry, [longest, *body]


def _gathered(lines):
  """Shapes of what is gathered."""
  shapes = []
  for line in lines:
    found = re.search(r" = (.*?) all-gather(-start)?\(", line)
    if found:
      shapes += [
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"\w+\[([\d,]+)\]", found[1])
      ]
  return shapes


class MemoryTest(parameterized.TestCase):
  def test_falls_with_fsdp(self):
    """What preflight shows of an update: parameters, Adam and gradients."""
    model = gpt2.GPT2(GPT2)
    optimizer = optax.adam(1e-3)
    # More tokens than a layer is wide: its parameters are gathered for them.
    ids, mask = tiny.batch(0, (16, 16))

    def update(state, ids, mask):
      params, moments = state
      loss = lambda p: jnp.sum(model.apply({"params": p}, ids, mask) ** 2)
      updates, moments = optimizer.update(jax.grad(loss)(params), moments)
      return optax.apply_updates(params, updates), moments

    found = {}
    for num_devices in (1, 2):
      mesh = meshes.make(f"fsdp:{num_devices}")
      shapes = tiny.params(GPT2)
      state = shapes, optimizer.init(shapes)
      shardings = meshes.shardings(state, hf.partition_rules(model, mesh), mesh)
      state = meshes.place(state, shardings)
      program = compiled.Compiled(
        "update", update, donate_argnums=0, out_shardings=shardings
      )
      with jax.numpy_dtype_promotion("standard"):  # Adam mixes types.
        program.compile(state, *meshes.shard_batch((ids, mask), mesh))
      (row,) = program.compilations
      found[num_devices] = row
      # The same number from the arrays themselves; ids and mask are small.
      self.assertLess(
        abs(row["argument_bytes"] - preflight.device_bytes(state)), 2000
      )
      self.assertLess(
        abs(found[1]["output_bytes"] - preflight.tree_bytes(state)), 1000
      )
    for part, share in (("argument", 0.55), ("output", 0.55), ("temporary", 1)):
      one, two = (found[n][f"{part}_bytes"] for n in (1, 2))
      self.assertLess(two, share * one, part)


# What their config.json says.
CONFIGS = {
  "qwen25_05b": {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
  },
  "qwen25_15b": {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
  },
  "llama3_8b": {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
  },
}


class FlagfilesTest(parameterized.TestCase):
  """The estimates of memory, against shapes of the real models."""

  @parameterized.parameters(*CONFIGS)
  def test_estimates(self, name):
    path = conftest.REPOSITORY / f"experiments/flags/grpo/{name}_gsm8k.flags"
    flags = dict(re.findall(r"^--(\w+)=(.*)$", path.read_text(), re.M))
    # The table of the page has a column for each flagfile.
    page = (conftest.REPOSITORY / "docs" / "devices.md").read_text()
    column = list(CONFIGS).index(name) + 1
    numbers = {}
    for line in page.splitlines():
      cells = [cell.strip() for cell in line.strip("|").split("|")]
      if len(cells) == len(CONFIGS) + 1:
        numbers[cells[0].split(",")[0]] = cells[column].strip("`")
    config = llama.LlamaConfig.from_hf(CONFIGS[name])
    model = llama.Llama(config)
    params = _shapes(model)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    self.assertEqual(numbers["parameters"], f"{count:,}")
    self.assertEqual(numbers["`--mesh`"], flags["mesh"])

    # They fit the mesh, and are split as the estimate says.
    spec = flags["mesh"]
    mesh = meshes.make("data:1" if spec == "data:-1" else spec)
    if name == "qwen25_15b":
      mesh = meshes.make("fsdp:4")
    rules = hf.partition_rules(model, mesh)

    def gigabytes(tree):
      shardings = meshes.shardings(tree, rules, mesh)
      sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
        tree,
        shardings,
      )
      return sum(jax.tree.leaves(sizes)) / 1e9

    state = params, jax.eval_shape(optax.adamw(1e-6).init, params)
    self.assertAlmostEqual(
      gigabytes(state), float(numbers["parameters and Adam"]), delta=0.01
    )
    self.assertAlmostEqual(
      gigabytes(params), float(numbers["reference"]), delta=0.01
    )
    rows = int(flags["batch_size"]) * int(flags["num_samples"])
    tokens = rows * int(flags["max_length"]) + int(flags["batch_size"]) * 256
    per_token = 2 * 2 * config.num_layers * config.num_kv_heads
    per_token *= config.head_dim
    # Keys and values lie on all devices but those of the data axis alone.
    cache = per_token * tokens / 1e9 / mesh.size
    self.assertAlmostEqual(
      cache, float(numbers["cache of the sampler"]), delta=0.01
    )


if __name__ == "__main__":
  absltest.main()

"""Every field of a config is honoured, known to be inert, or refused."""

import dataclasses
import json
import pathlib
import tempfile

import pytest
from absl.testing import absltest, parameterized

from rljax import export
from rljax.models import configs, fields, rope
from tests import tiny
from tests.models import hf_test

transformers = pytest.importorskip("transformers")

SETTINGS = configs.settings("float32", "float32", False)
CONFIGS = hf_test.CONFIGS | {
  name: {
    **sizes,
    "architectures": [hf_test.ARCHITECTURES[name]],
    "id2label": {"0": "bad", "1": "good"},
  }
  for name, sizes in hf_test.ENCODERS.items()
}
# What may be left out of a config.json here; transformers has a default for
# sizes, too, but a model without them is a mistake.
REQUIRED = {
  *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
  *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
  *("n_embd", "n_layer", "n_head", "n_positions"),
  *("dim", "hidden_dim", "n_layers", "n_heads"),
}
# Nothing that this package computes depends on these.
INERT = {
  # Training and speed.
  *("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"),
  *("hidden_dropout_prob", "attention_probs_dropout_prob", "use_cache"),
  *("classifier_dropout", "qa_dropout", "seq_classif_dropout"),
  *("chunk_size_feed_forward", "pretraining_tp"),
  # What a call returns, and of which class.
  *("output_hidden_states", "output_attentions", "return_dict", "dtype"),
  *("transformers_version", "_name_or_path", "label2id"),
  # Heads of other tasks.
  *("summary_type", "summary_use_proj", "summary_activation"),
  *("summary_proj_to_labels", "summary_first_dropout"),
  # The table of positions stands in the file, however it was made.
  "sinusoidal_pos_embds",
}
# Of some model types only.
INERT_FOR = {
  # Classifiers have no output layer, and encoders no gated attention.
  "bert": {"tie_word_embeddings"},
  "roberta": {"tie_word_embeddings"},
  "distilbert": {"tie_word_embeddings"},
  # Layers have a window only with use_sliding_window.
  "qwen2": {"sliding_window", "max_window_layers"},
  "qwen3": {"sliding_window", "max_window_layers"},
  # Language models have no labels.
  **{
    name: {"id2label", "problem_type"} for name in ("llama", "mistral", "gpt2")
  },
}
for _name in ("qwen2", "qwen3"):
  INERT_FOR[_name] |= {"id2label", "problem_type"}
# Golden files of the other families, and what is inert there.
_UNTIED = {"tie_word_embeddings"}
FAMILIES = {
  "gemma": set(),
  "gemma2": set(),
  "gpt_neox": {"hidden_dropout", "is_decoder"},
  "granite": set(),
  "mixtral": {"output_router_logits", "router_jitter_noise"},
  "olmo2": set(),
  "opt": {"layerdrop"},
  "phi3": set(),
  "qwen3_moe": {"output_router_logits", "sliding_window"},
  "smollm3": {"no_rope_layer_interval"},  # The layers are named.
  "xlm_roberta": _UNTIED,
  "electra": _UNTIED | {"summary_last_dropout"},
  "modernbert": {
    *("initializer_cutoff_factor", "cls_token_id", "sep_token_id"),
    *("embedding_dropout", "mlp_dropout", "deterministic_flash_attn"),
    *("decoder_bias", "sparse_prediction", "sparse_pred_ignore_index"),
    "global_attn_every_n_layers",  # The layers are named.
  },
}
OTHER_VALUES = {
  "hidden_act": "relu",
  "activation_function": "relu",
  "activation": "relu",
  "hidden_activation": "gelu",
  "classifier_activation": "relu",
  "classifier_pooling": "mean",
  "mlp_only_layers": [],
  "no_rope_layers": [1, 1, 0],
  "problem_type": "regression",
  "id2label": {"0": "a", "1": "b", "2": "c"},
  "eos_token_id": [3, 4],
  "is_encoder_decoder": True,
  "layer_types": ["sliding_attention", "full_attention"],
  "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
}
# Not in the classes of transformers 5, but in files.
LEGACY = {
  "llama": {
    "rope_theta": 5e5,
    "rope_scaling": {"type": "linear", "factor": 4.0},
    "quantization_config": {"quant_method": "gptq"},
    "partial_rotary_factor": 0.5,
  },
  "gpt2": {"hidden_size": 64, "quantization_config": {"bits": 8}},
  "bert": {"position_embedding_type": "relative_key"},
}
WINDOW = {"sliding_window": 8, "max_window_layers": 0}
NASTY = (
  *(None, True, 0, -1, 2**60, -(2**60), 10**400, 1.5, 1e308),
  *(float("nan"), float("inf"), "", "x", "12", "false"),
  *([], [1], [[[]]], {}, {"a": 1}, [None], {"0": None}),
)


def _built(kind, **changes):
  config = {**CONFIGS[kind], "model_type": kind, **changes}
  return configs.build(config, pathlib.Path("it"), SETTINGS).config


def _other(name, value):
  """Another value of the same kind."""
  if isinstance(value, list) and value[::-1] != value:
    return value[::-1]
  if name in OTHER_VALUES and OTHER_VALUES[name] != value:
    return OTHER_VALUES[name]
  if isinstance(value, bool):
    return not value
  if isinstance(value, int | float):
    return value * 2 if value else 1
  if isinstance(value, str):
    return "gelu" if value == "relu" else "relu"
  return 7 if value is None else value


def _overlooked(test, base_config, inert):
  """Fields of transformers whose change neither matters nor is refused."""
  model_type = base_config["model_type"]
  given = {k: v for k, v in base_config.items() if k != "model_type"}
  known = transformers.CONFIG_MAPPING[model_type](**given)
  legacy = LEGACY.get(model_type, {})
  values = known.to_dict() | legacy
  del values["model_type"], values["architectures"]

  def built(**changes):
    config = {**base_config, **changes}
    return configs.build(config, pathlib.Path("it"), SETTINGS).config

  base, found = built(), []
  for name, value in values.items():
    other = value if name in legacy else _other(name, value)
    # A window matters where it is shorter than the text.
    more = WINDOW if name == "use_sliding_window" else {}
    try:
      is_read = built(**{name: other}, **more) != base
    except ValueError as error:
      is_read = True
      test.assertStartsWith(str(error), "it: ")
    if is_read == (name in inert):
      found.append((name, other))
  return found


class AuditTest(parameterized.TestCase):
  @parameterized.parameters(*CONFIGS)
  def test_no_field_of_transformers_is_overlooked(self, model_type):
    config = {**CONFIGS[model_type], "model_type": model_type}
    inert = INERT | INERT_FOR.get(model_type, set())
    self.assertEqual(_overlooked(self, config, inert), [])

  @parameterized.parameters(*FAMILIES)
  def test_nor_of_other_families(self, name):
    config = tiny.golden(name)["config"]
    inert = INERT | FAMILIES[name]
    if not configs.describes_classifier(config):
      inert = inert | {"id2label", "problem_type"}
    self.assertEqual(_overlooked(self, config, inert), [])

  @parameterized.parameters(*FAMILIES)
  def test_nonsense_in_other_families(self, name):
    config = tiny.golden(name)["config"]
    build = lambda c: configs.build(c, pathlib.Path("it"), SETTINGS).config
    for field in {**config, **build(config).to_hf()}:
      for value in NASTY:
        try:
          build(config | {field: value})
        except ValueError as error:
          self.assertLess(len(str(error)), 500)

  @parameterized.parameters(*CONFIGS)
  def test_defaults_are_those_of_transformers(self, model_type):
    least = {
      name: value
      for name, value in CONFIGS[model_type].items()
      if name in REQUIRED or name in ("architectures", "id2label")
    }
    expected = transformers.CONFIG_MAPPING[model_type](**least).to_dict()
    # The ids are no sizes: what is not said is unknown here.
    for name in ("bos_token_id", "eos_token_id"):
      expected[name] = None
    if model_type == "mistral":  # Its window of 4096 is longer than the text.
      least |= {"max_position_embeddings": 64}
    left_out = configs.build(
      {**least, "model_type": model_type}, pathlib.Path("it"), SETTINGS
    ).config
    given = configs.build(
      {**least, **expected, "model_type": model_type},
      pathlib.Path("it"),
      SETTINGS,
    ).config
    self.assertEqual(left_out, given)

  def test_a_missing_window_is_that_of_mistral(self):
    config = {"max_position_embeddings": 8192}
    left_out = {**CONFIGS["mistral"], **config}
    del left_out["sliding_window"]
    completed = fields.checked({**left_out, "model_type": "mistral"})
    self.assertEqual(completed["sliding_window"], 4096)

  @parameterized.parameters(*CONFIGS)
  def test_nonsense_is_refused_by_name(self, model_type):
    names = {**CONFIGS[model_type], **_built(model_type).to_hf()}
    names |= dict.fromkeys(("rope_scaling", "layer_types", "text_config"))
    for name in names:
      for value in NASTY:
        try:
          _built(model_type, **{name: value})
        except ValueError as error:
          self.assertLess(len(str(error)), 500)

  def test_types_are_not_guessed(self):
    for name, value in (
      ("tie_word_embeddings", "false"),
      ("vocab_size", "48"),
      ("rms_norm_eps", "1e-5"),
      ("num_hidden_layers", 100_000),
      ("hidden_size", 32.0),
      ("eos_token_id", 48),
      ("pad_token_id", -2),
    ):
      with self.assertRaisesRegex(ValueError, f'it: .*"{name}" must be'):
        _built("llama", **{name: value})
    self.assertIsNone(_built("llama", pad_token_id=-1).pad_token_id)

  def test_other_names_of_a_field(self):
    config = {**CONFIGS["gpt2"], "hidden_size": 32}
    self.assertEqual(_built("gpt2", hidden_size=32), _built("gpt2"))
    del config["n_embd"]
    built = configs.build(
      {**config, "model_type": "gpt2"}, pathlib.Path("it"), SETTINGS
    )
    self.assertEqual(built.config, _built("gpt2"))
    with self.assertRaisesRegex(ValueError, '"n_embd" and "hidden_size"'):
      _built("gpt2", hidden_size=64)


class NestedRopeTest(parameterized.TestCase):
  ONE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}

  @parameterized.parameters("rope_parameters", "rope_scaling")
  def test_one_for_all_layers_is_read(self, name):
    nested = {"full_attention": self.ONE, "sliding_attention": self.ONE}
    self.assertEqual(
      rope.Rope.from_hf({name: nested}), rope.Rope.from_hf({name: self.ONE})
    )
    # Those of layers that the model has not do not count.
    nested["sliding_attention"] = {"rope_theta": 1e4}
    self.assertEqual(
      rope.Rope.from_hf({name: nested, "layer_types": ["full_attention"] * 2}),
      rope.Rope.from_hf({name: self.ONE}),
    )

  def test_what_sets_nothing_beside_the_layers_is_left_out(self):
    kinds = {"full_attention": self.ONE, "sliding_attention": self.ONE}
    nested = {**kinds, "rope_type": "default", "rope_theta": None}
    self.assertEqual(
      rope.Rope.from_hf({"rope_parameters": nested}),
      rope.Rope.from_hf({"rope_parameters": self.ONE}),
    )
    self.assertEqual(
      rope.by_layer_type({"rope_parameters": nested}, tuple(kinds)), kinds
    )
    for other in ({"rope_theta": 1e4}, {"rope_type": "linear"}):
      config = {"rope_parameters": {**nested, **other}}
      with self.assertRaisesRegex(ValueError, "for each of full_attention"):
        rope.by_layer_type(config, tuple(kinds))
      with self.assertRaisesRegex(ValueError, "only one for all layers"):
        rope.Rope.from_hf(config)

  @parameterized.parameters([[1]], "x", 3)
  def test_what_is_no_object_is_refused(self, given):
    config = {"rope_parameters": given}
    for read in (
      rope.Rope.from_hf,
      lambda config: rope.by_layer_type(config, ("full_attention",)),
    ):
      with self.assertRaisesRegex(ValueError, "must be a JSON object, got"):
        read(config)

  def test_layers_that_differ_are_refused(self):
    nested = {"full_attention": self.ONE, "sliding_attention": {}}
    with self.assertRaisesRegex(
      ValueError, '"rope_parameters".*full_attention, sliding_attention'
    ):
      rope.Rope.from_hf({"rope_parameters": nested})
    kinds = ["full_attention", "chunked_attention"]
    with self.assertRaisesRegex(ValueError, "only one for all layers"):
      rope.Rope.from_hf(
        {
          "rope_parameters": {"full_attention": self.ONE},
          "layer_types": kinds,
        }
      )

  @parameterized.parameters(
    ({"mrope_section": [1, 2]}, "mrope_section is not supported"),
    ({"rope_type": ["yarn"]}, "is not supported, only default"),
    ({"rope_theta": "1e4"}, '"rope_theta" must be a number above 1'),
    ({"rope_theta": 1.0}, '"rope_theta" must be a number above 1'),
    ({"rope_type": "linear", "factor": 0}, "factor.* a number above 0"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, '"truncate" must be'),
    (
      {
        **{"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8},
      },
      '"low_freq_factor" must be below',
    ),
  )
  def test_nonsense(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      rope.Rope.from_hf(
        {"rope_parameters": given, "max_position_embeddings": 64}
      )


class JsonTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(folder) / "config.json"

  def test_a_byte_order_mark_is_read_over(self):
    self.path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    self.assertEqual(configs.read_json(self.path), {"a": 1})

  @parameterized.parameters(
    (b"", "is not JSON"),
    (b"[]", "must hold a JSON object"),
    (b"null", "must hold a JSON object"),
    (b"[" * 100_000, "is not JSON"),
    (b'{"a":' * 100_000, "is not JSON"),
    (b'{"a": NaN}', "NaN is no JSON number"),
    (b'{"a": ' + b"9" * 10_000 + b"}", "is not JSON"),
    ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
    (b'{"a": 1, "a": 2}', '"a" stands twice'),
  )
  def test_what_is_no_object(self, content, message):
    self.path.write_bytes(content)
    with self.assertRaisesRegex(ValueError, f"config.json .*{message}"):
      configs.read_json(self.path)

  def test_a_folder(self):
    self.path.mkdir()
    with self.assertRaisesRegex(ValueError, "cannot be read: Is a directory"):
      configs.read_json(self.path)


class EndTokensTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(folder)

  def _ends(self, config, generation=None):
    (self.path / "config.json").write_text(json.dumps(config))
    path = self.path / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
      path.write_text(json.dumps(generation))
    return configs.read_config(self.path).get("eos_token_id")

  def test_all_files_count(self):
    self.assertIsNone(self._ends({}))
    self.assertEqual(self._ends({"eos_token_id": 2}), 2)
    self.assertEqual(self._ends({"eos_token_id": 2}, {"eos_token_id": 2}), 2)
    self.assertEqual(
      self._ends({"eos_token_id": 2}, {"eos_token_id": [5, 2]}), [2, 5]
    )
    self.assertEqual(self._ends({}, {"eos_token_id": 5}), 5)
    nested = {"eos_token_id": [2], "text_config": {"eos_token_id": 7}}
    self.assertEqual(self._ends(nested, {"eos_token_id": -1}), [2, 7])
    with self.assertRaisesRegex(ValueError, "generation_config.json: .*eos_to"):
      self._ends({}, {"eos_token_id": "</s>"})

  def test_all_are_kept_on_export(self):
    self._ends(
      {**hf_test.CONFIGS["llama"], "model_type": "llama", "eos_token_id": 7},
      {"eos_token_id": [7, 8]},
    )
    config = hf_test.hf.load_config(self.path)
    self.assertEqual(config.eos_token_id, (7, 8))
    model = hf_test._module(config)
    exported = self.path / "exported"
    hf_test.hf.save(
      exported, model, hf_test._random_params(model), hf_test._tokenizer()
    )
    for name in ("config.json", "generation_config.json"):
      written = json.loads((exported / name).read_text())
      self.assertEqual(written["eos_token_id"], [7, 8, 1])
    export.export(exported, self.path / "again")
    written = json.loads(
      (self.path / "again" / "generation_config.json").read_text()
    )
    self.assertEqual(written["eos_token_id"], [7, 8, 1])
    self.assertEqual(
      hf_test.hf.load(exported).model.config,
      dataclasses.replace(
        config, bos_token_id=0, eos_token_id=(7, 8, 1), pad_token_id=2
      ),
    )


if __name__ == "__main__":
  absltest.main()

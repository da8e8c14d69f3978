"""Tokenizers of every kind, made in a moment."""

import tokenizers
import transformers

TEXTS = (
  "Once upon a time, there was a little girl named Lily.",
  "  two  blanks,\ttab\nline\r\n\n12 + 3.14 = 15.14",
  "naïve café – “quotes” … 漢字 🙂👩‍🚀 Ελλάδα",
  "don't we'll I'm <0x0A> Ġ",
  "x",
  "",
)


def byte_level_bpe():
  """A GPT-2-like tokenizer, trained on a few lines."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|end|>"],
    show_progress=False,
  )
  backend.train_from_iterator(TEXTS * 3, trainer)
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<|end|>"
  )
  # Added, not special: one inside the alphabet of bytes, one outside.
  tokenizer.add_tokens(["<think>", "a b"])
  return tokenizer


def metaspace(byte_fallback=True):
  """A Llama-2-like tokenizer of single characters and a few words."""
  words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
  words += ["▁", "▁a", "b", "1", "2", "=", "."]
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {word: i for i, word in enumerate(words)},
      [],
      unk_token="<unk>",
      byte_fallback=byte_fallback,
    )
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  backend.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Metaspace(),
    ]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    unk_token="<unk>",
    bos_token="<s>",
    eos_token="</s>",
  )


def ending(tokenizer, template):
  """The tokenizer with another post-processor."""
  specials = [
    (t, tokenizer.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")
  ]
  tokenizer.backend_tokenizer.post_processor = (
    tokenizers.processors.TemplateProcessing(
      single=template, special_tokens=specials
    )
  )
  return tokenizer

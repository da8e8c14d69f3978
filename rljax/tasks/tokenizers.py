"""Tokenizers of a few words, for models trained from scratch."""

from collections.abc import Sequence

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


def of_words(words: Sequence[str], pattern: str):
  """Makes a tokenizer of the given words and three special tokens.

  Args:
    words: their ids are 0, 1, ...; then come the tokens that start a prompt
      (the tokenizer adds it), end a response, and pad.
    pattern: regular expression that matches a word of a text. A word that is
      not among `words` is an error.

  Returns:
    A Hugging Face fast tokenizer, which `save_pretrained` saves and
    `AutoTokenizer` loads. Decoding joins the words without blanks.
  """
  import tokenizers
  import transformers

  ids = {word: i for i, word in enumerate([*words, BOS, EOS, PAD])}
  # Without an unknown token, a word outside the vocabulary is an error.
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex(pattern), behavior="isolated"
  )
  backend.decoder = tokenizers.decoders.Fuse()
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token=BOS,
    eos_token=EOS,
    pad_token=PAD,
    padding_side="left",
    clean_up_tokenization_spaces=False,
  )

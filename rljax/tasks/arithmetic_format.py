"""The arithmetic task, rewarded for the form of an answer alone.

A sanity check: any learner must solve it within tens of updates.
"""

from rljax.tasks import arithmetic

prompts = arithmetic.prompts
supervised = arithmetic.supervised
score = arithmetic.format_score
word_tokenizer = arithmetic.word_tokenizer
character_tokenizer = arithmetic.character_tokenizer

"""The generative reward model of RLMEC: its questions, answers and targets."""

"""Judging a model by what it writes: answers to prompts from files, scored, compared with a base's, and summed up."""

"""Experiments on prompts whose answer is known: cloze, scores of features, features taken out."""

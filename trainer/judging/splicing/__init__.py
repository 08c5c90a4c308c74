"""Forward passes with dictionaries in place of activations, and what they cost in sums."""

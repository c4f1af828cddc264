"""The backends: row functions and products on a chunk of logits; `base.py` has what they supply and their table."""

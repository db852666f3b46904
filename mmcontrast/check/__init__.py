"""Checks before a run: `grads` proves that one gradient comes of every split, `shards` looks through the data."""

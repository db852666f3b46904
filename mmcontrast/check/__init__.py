"""Checks that a person runs on their own recipe: `grads` proves that one gradient comes of every split."""

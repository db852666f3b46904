"""Questions asked of a model, one file each: zero-shot classification, retrieval; and the index."""

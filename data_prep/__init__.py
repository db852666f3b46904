"""Raw corpora -> shards with a manifest, one file per source."""

"""Models that come with sparse-prune: import sparse_prune.models.garlic, which needs transformers."""

"""Is a patched model as good as the original? lm-eval on both, and the distance between their predictions."""

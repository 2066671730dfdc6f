"""What knows transformers: which layers are Mamba-2 mixers, and how the fast forward gets onto them and off again."""

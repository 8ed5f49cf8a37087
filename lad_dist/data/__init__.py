"""From text to batches: sources of text, tokenizers, token shards, tasks, and the datasets that training reads."""

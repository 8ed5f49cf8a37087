"""From text to batches.

corpus                  documents out of text files, tables and hub datasets (lines, tables, hub)
tokenizers              load, train, frame and compare tokenizers; the only importer of transformers here
train_tokenizer         a tokenizer out of a corpus
prepare, pieces, merge  text -> token shards on disk, by many processes (child), taken up again where they were stopped
shards                  reads and verifies them
keyed, order, masking   which windows a step reads and what MLM hides in them: pure functions of (seed, step)
tasks, tagging, squad   GLUE's nine tasks and the user's own labelled files (labels, hub)
examples                tasks in tokens: what a head reads, what it should say, and how good an answer is
batch, feed, loader     flat batches, what the training loop reads them from, and processes that load ahead of it
documentation           text that every installation carries, for the quickstart
"""

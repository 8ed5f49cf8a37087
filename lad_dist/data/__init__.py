"""From text to batches.

corpus, lines, hub   documents out of files and hub datasets
tokenizers           load, train, frame and compare tokenizers; the only importer of transformers here
train_tokenizer      a tokenizer out of a corpus
prepare, shards      text -> token shards on disk, and back
order, masking       which sequences a step reads and what MLM hides in them: pure functions of (seed, step)
tasks                GLUE's nine tasks and the user's own labelled files
batch, feed          flat batches, and what the training loop reads them from
"""

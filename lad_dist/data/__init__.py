"""From text to batches.

sources        documents of text files, tables and hub datasets; the text that every installation carries
tokenization   tokenizers are loaded, trained, compared, and encode texts
shards         text -> token shards on disk, by many processes, resumed where they were stopped; reads and verifies them
tasks          GLUE's nine tasks and the user's own labelled files, as examples in tokens, with their metrics
sampling, mlm  which windows a step reads and which of their tokens are masked: pure functions of (seed, step)
datasets       micro-batches by (step, micro-batch), of a corpus or a task
loader         processes that load batches ahead of the training loop
"""

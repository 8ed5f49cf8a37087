"""Many run folders as one comparison: methods by tasks, mean ± sd over seeds.

build        the whole of it: what `lad-dist report` calls
results      the complete task runs below the folders, and which folders were skipped
settings     the settings in which runs differ
comparison   scores, order and tests of the methods, which are the runs of one label
markdown     a comparison to read
csv_table    a comparison as rows, one per run
plots        a comparison as a plot
pareto       quality against latency and bytes, as a plot
"""

"""lad_dist: distributed pre-training distillation and layer-wise adaptive task compression for BERT-family encoders.

Six words carry the package: a Trace is what one forward leaves behind (`flat`), a Part is a compressed piece of a
student (`parts`), a surgery turns a model into a model (`surgery`), an objective turns two traces into weighted loss
terms (`objectives`), a Method is a student with its objective (`method`), and `train(config, report)` is the only loop
(`train`).
"""

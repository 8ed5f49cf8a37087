"""Start `lad-dist prepare` under a launcher, in a clone: deepspeed launch/prepare_corpus.py CONFIG."""

from lad_dist.cli.main import main

if __name__ == "__main__":
    main("prepare")

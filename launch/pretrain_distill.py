"""Start `lad-dist pretrain` under a launcher, in a clone: deepspeed launch/pretrain_distill.py CONFIG."""

from lad_dist.cli.main import main

if __name__ == "__main__":
    main("pretrain")

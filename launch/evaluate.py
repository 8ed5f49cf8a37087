"""Start `lad-dist evaluate` under a launcher, in a clone: deepspeed launch/evaluate.py CONFIG."""

from lad_dist.cli.main import main

if __name__ == "__main__":
    main("evaluate")

"""Start `lad-dist distill` under a launcher, in a clone: deepspeed launch/task_distill.py CONFIG."""

from lad_dist.cli.main import main

if __name__ == "__main__":
    main("distill")

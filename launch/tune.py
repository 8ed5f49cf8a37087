"""Start `lad-dist tune` under a launcher, in a clone: deepspeed launch/tune.py CONFIG."""

from lad_dist.cli.main import main

if __name__ == "__main__":
    main("tune")

"""Start `lad-dist finetune` under a launcher, in a clone: deepspeed launch/finetune_teacher.py CONFIG."""

from lad_dist.cli.main import main

if __name__ == "__main__":
    main("finetune")

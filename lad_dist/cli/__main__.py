"""Entry of `python -m lad_dist.cli` and of `deepspeed --module lad_dist.cli`."""

from lad_dist.cli.main import main

main()

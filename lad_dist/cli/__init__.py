"""What all launch scripts share: parse, run, exit code, console."""

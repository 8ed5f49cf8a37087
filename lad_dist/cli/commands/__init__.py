"""The commands: functions whose docstring is the text of `--help`. What a command runs is imported in it."""

"""Commands: the flags, the help and the `run` of each.

A command imports the module that does its work inside `run`: with torch and transformers that takes
seconds, in which `--help` and a mistyped flag would have no answer.
"""

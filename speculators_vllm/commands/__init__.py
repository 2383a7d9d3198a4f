"""Commands that need vLLM: the flags, the help and the `run` of each.

A command imports the module that does its work inside `run`: with vLLM that takes seconds, in which
`--help` and a mistyped flag would have no answer.
"""

"""Rows of files and their messages, read in one way by every command."""

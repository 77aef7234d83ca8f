"""Killable child processes that compile, check and time."""

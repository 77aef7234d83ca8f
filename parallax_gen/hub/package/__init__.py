"""What a hub package has in place of modules that need records, templates or this package's other dependencies.

`hub/sources.py` says which module each file here stands for. The rest of a hub package is this package's own code. All
of it imports the standard library, torch and triton only, and has the syntax of Python 3.9.
"""

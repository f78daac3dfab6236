"""The commands of ``python -m flash_attn_sm120``, a module each.

A module's docstring is its help, ``add_arguments`` declares its options, and ``run`` does the work
and returns the exit status. A RuntimeError is something that can be expected of a machine, such as
a missing driver: ``__main__`` prints its message in place of a traceback.
"""

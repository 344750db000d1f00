"""The same masks on the fly: rows of any epoch from the scored shards, for a training process.

rows.py      MaskedRows: any row of any epoch, by its place
columns.py   the scored rows as flat arrays in memory-mapped files, made once on a machine
sources/given_paths.py    which scored row stands at which place of an epoch
stream.py    rows in order for several ranks and workers, and where they are (torch)
"""

"""The same masks on the fly: rows of any epoch from the scored shards, for a training process.

rows.py      MaskedRows: any row of any epoch, by its place
cache.py     where the scored rows lie as flat arrays, made once on a machine
stream.py    rows in order for several ranks and workers, and where they are (torch)
"""

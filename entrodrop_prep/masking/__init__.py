"""From scored directories and a recipe to the masked rows of any epoch, by position; NumPy, and no other engine.

sources.py      the scored directories of a run, their names and weights
columns.py      their rows as flat arrays in memory-mapped files, read once
order.py        which scored row is at which position of an epoch
plan.py         thresholds, protected ids, the replacement
epoch_rows.py   EpochRows: the masked rows at any positions of any epoch
packing.py      which documents share a packed row; assembly.py makes such rows
"""

"""Studies: the same measurement for many methods, settings and seeds, kept as one tidy frame.

A study (`study.Study`) names its seeds, kinds, methods, tasks and budget, and divides its work into cells: a cell is
one method of one part of the study, on one kind and one seed. `running` computes the cells that are missing. A cell
gives rows, whose columns are study, part, kind, seed, method, setting, task, split, n, score and seconds; a study adds
columns where it has more to say. `frame` appends a cell to a file as one line, so that a cell is there whole or not at
all, and the same command goes on where it was stopped. Every table and picture is a view of that frame. `tables` has
the views that studies share: means with intervals, and differences paired by seed.

`paper` is Section 5.2 of the paper, `federated` the powers p and k in federated rounds; both are declarations, plus
what only they do. `python -m simulations.studies paper` and `python -m simulations.studies federated` run them.
"""

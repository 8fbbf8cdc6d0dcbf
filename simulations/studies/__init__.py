"""Studies: the same measurement for many methods, settings and seeds, in one tidy frame.

A study (`study.Study`) names its seeds, kinds, methods, tasks and budget, and divides its work into cells. A cell is
one method of one part of the study, for one kind and one seed. `running` computes the missing cells. A cell has rows
with the columns study, part, kind, seed, method, setting, task, split, n, score and seconds; a study may add columns.
`frame` appends each cell to a file as one line: a cell is in the file completely or not at all, and a command that was
stopped goes on with the missing cells. Every table and picture is a view of the frame. `tables` has the views that
studies share: means with intervals, and differences paired by seed.

`paper` is Section 5.2 of the paper. `federated` measures the powers p and k in federated rounds. Each is a declaration
with its own views and computations. `python -m simulations.studies paper` and `python -m simulations.studies federated`
run them.
"""

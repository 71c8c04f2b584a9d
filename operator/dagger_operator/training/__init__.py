"""Labels become the next student: cross-entropy on the tokens of the teacher's turns, nothing else (paper, section 3).

The way of the data, one file each: `samples` (labelled states as the student's tokens), `packing` (samples as sequences),
`batches` (which samples make which step), `loss`, `loop`, `checkpoints`, `export`. `__main__` starts one `rank` for each process of
this pod. Nothing but `rank` and what it calls imports torch.
"""

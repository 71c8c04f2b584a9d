"""Trains the next student on the labels. Only the tokens of the teacher's turns are learned, by cross-entropy (paper, section 3) or, with
`training.loss: ForwardKL`, by divergence from the teacher's distribution.

Data flow, one file each: `samples` (labelled states as the student's tokens), `packing` (samples as sequences), `batches` (which
samples make which step), `loss`, `loop`, `checkpoints`, `export`. `__main__` starts one `rank` for each process of this pod. Nothing but
`rank` and what it calls imports torch.
"""

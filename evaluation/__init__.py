"""A row an image: what a blend says of each, how good that is, which labels look wrong, and why.

Takes a run folder, or its models and labelled images; gives tables, charts and one page to review
labels by. Stored OOF predictions need no torch.
"""

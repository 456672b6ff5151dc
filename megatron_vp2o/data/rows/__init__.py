"""Rows of a user's files: JSONL, JSONL.gz, parquet, folders of them, and the `datasets` library's folders and hub names.

sources   which files a path means
readers   one row by its number, from a file of each kind
columns   what of a row is the prompt, the answer, the demonstration
index     where each row lies and what it is, kept on disk, so that a start does not read the file again
splits    held-out rows, weights of files, the order of an epoch
"""

"""Input from strangers, by the hundred thousand: what is promised of every function that reads it.

One target a file. `make fuzz` runs them guided by coverage; the suite runs a few hundred
inputs of each, and every case that was ever found. See docs/evidence/fuzzing.md.
"""

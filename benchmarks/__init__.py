"""What Veneer costs, measured: one script a figure, rendered to docs/benchmarks.md.

harness.py   contenders in turn in one process, medians of ratios; every script is written with it
record.py    what was measured, as data: Figure > Table > Row, and the Aim of a row; JSON in results/
peak.py      the peak memory of one step, in a process of its own
<figure>.py  one figure each: `python -m benchmarks.<figure>`
__main__.py  all of them, and the page: `python -m benchmarks`, or `make bench`
"""

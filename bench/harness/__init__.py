"""Measures the ways to compute one thing beside one another, keeps the results as rows, judges targets by them.

`cases` says what a bench gives, `measure` runs it (`timing`, `memory`, `launches`, `rates`), `rows` keeps the results,
`report` shows them, `targets` judges them. `rows` and `targets` import no torch: the tables of README come from them.
"""

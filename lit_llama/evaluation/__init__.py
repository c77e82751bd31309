"""Measuring what was learned: the harness, judges, forms, intervals, pages of answers."""

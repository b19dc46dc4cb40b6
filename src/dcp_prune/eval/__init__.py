"""Measuring pruners: accuracy on the same questions for everybody, and how sure the numbers are."""

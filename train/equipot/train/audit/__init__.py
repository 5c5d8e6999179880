"""Asks stores whether they are consistent: units, signs, duplicates, leaks, outliers; tells it on a page."""

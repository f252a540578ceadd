"""Reads the rows of data files in batches, with bounded memory; one module for each family of
formats.
"""

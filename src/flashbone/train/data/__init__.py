"""Rows: files and datasets read row by row, formats that make examples of them, splits and windows."""

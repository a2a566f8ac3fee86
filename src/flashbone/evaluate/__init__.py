"""Measuring what a model can do: losses and scores of single rows, with intervals that say how sure a figure is."""

"""PEFT's side of flashbone: configuration, layers, model, and their registration."""

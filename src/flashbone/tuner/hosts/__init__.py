"""What is added to PEFT, transformers and diffusers: tables, adapter methods, hot swap."""

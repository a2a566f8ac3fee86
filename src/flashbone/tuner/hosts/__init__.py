"""What hosts do: PEFT's tables, methods of transformers and diffusers, other adapters, sharded weights."""

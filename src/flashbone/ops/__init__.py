"""The moves of the variants, with hand-written backward where autograd would keep too much; and their oracle."""

"""Ways into tools that train with PEFT and that nobody can add an import to; `flashbone run` is one for all of them."""

"""The engine of `flashbone compare`: methods at equal size, on the same data, each in a process of its own."""

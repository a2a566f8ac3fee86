"""`flashbone compare`: methods of fine-tuning at equal size on one's own model and data."""

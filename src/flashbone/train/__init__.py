"""Fine-tuning: one recipe, data in the usual formats, TRL's and transformers' trainers, resume, results on disk."""
